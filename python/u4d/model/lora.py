"""Low-rank adapters (LoRA) over the stacked weights: fine-tuning that trains one or two weights in a hundred.

Every stream has adapters of its own, as it has weights of its own; see `lora_folder` for the files.
Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from u4d.errors import UserError
from u4d.model.stacked import StackedLinear
from u4d.model.transformer import Transformer
from u4d_fast import Fp8Rows

BLOCKS = "blocks."
TARGETS = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
)


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get adapters, and how large they are.

    Attributes:
        rank: of each stream's update of a weight.
        alpha: the update is scaled by alpha / rank.
        targets: linear layers of the blocks, by the end of their dotted names: "attn1.to_q" is one layer in every
            block, "to_q" is two, "blocks.0.ffn.net.2" is a single one.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise UserError(f"rank: expected a positive whole number, got {self.rank!r}")
        if not math.isfinite(self.alpha):
            raise UserError(f"alpha: expected a finite number, got {self.alpha!r}")
        if not self.targets:
            raise UserError("targets: expected at least one, got none")

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / self.rank


class LoRALinear(StackedLinear):
    """A stacked linear layer with adapters: `y = W x + b + alpha / rank B (A x)`, per stream.

    The base layer's parameters are taken over as they are, under their own names; `lora_A` `[S,rank,in]` and `lora_B`
    `[S,out,rank]` come beside them, in float32 whatever the base's dtype. B starts at zero, so that nothing changes.
    """

    def __init__(self, base: StackedLinear, config: LoRAConfig) -> None:
        streams, out_features, in_features = base.weight.shape
        with torch.device("meta"):  # the weights made here are replaced
            super().__init__(streams, in_features, out_features)
        self.weight, self.bias = base.weight, base.bias
        self.config = config
        device, bound = base.weight.device, 1 / math.sqrt(in_features)
        down = torch.empty(streams, config.rank, in_features, device=device, dtype=torch.float32)
        self.lora_A = nn.Parameter(down.uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(streams, out_features, config.rank, device=device, dtype=torch.float32))
        self.train(base.training)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """`[S,...,in]` -> `[S,...,out]`; the adapters are applied in the dtype of the base's result."""
        result = super().forward(x)
        base = result.flatten(1, -2)
        x = x.dequantize() if isinstance(x, Fp8Rows) else x
        down = torch.bmm(x.flatten(1, -2).to(base.dtype), self.lora_A.mT.to(base.dtype))
        up = torch.baddbmm(base, down, self.lora_B.mT.to(base.dtype), alpha=self.config.scale)
        return up.view_as(result)

    def merged_weight(self) -> Tensor:
        """`W + alpha / rank B A`, `[S,out,in]` in float32 or the weight's own higher precision."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, down, up = (part.to(dtype) for part in (self.weight, self.lora_A, self.lora_B))
        return torch.baddbmm(weight, up, down, alpha=self.config.scale)

    def without_adapter(self) -> StackedLinear:
        """A plain layer of the same weights."""
        streams, out_features, in_features = self.weight.shape
        with torch.device("meta"):
            plain = StackedLinear(streams, in_features, out_features)
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)


def add_lora(transformer: Transformer, config: LoRAConfig | None = None) -> None:
    """Give the targets adapters, to be trained; all other parameters are frozen. The model computes what it did.

    Raises:
        UserError: a target that is no linear layer of the blocks, or a model that has adapters.
    """
    config = config or LoRAConfig()
    names = find_targets(transformer, config.targets)
    transformer.requires_grad_(False)
    for name in names:
        layer = transformer.get_submodule(name)
        assert isinstance(layer, StackedLinear)
        transformer.set_submodule(name, LoRALinear(layer, config))


@torch.no_grad()
def merge_lora(transformer: Transformer) -> None:
    """Fold the adapters into the weights, whose dtype stays: no extra work at inference, and no way back.

    In bfloat16 an update far smaller than its weight is rounded away; adapters that are not merged keep it.

    Raises:
        UserError: there are none.
    """
    for layer in require_lora(transformer).values():
        layer.weight.copy_(layer.merged_weight())
    remove_lora(transformer)


def remove_lora(transformer: Transformer) -> None:
    """Take the adapters away: the model is as before `add_lora`, and its parameters can be trained again.

    Raises:
        UserError: there are none.
    """
    for name, layer in require_lora(transformer).items():
        transformer.set_submodule(name, layer.without_adapter())
    transformer.requires_grad_(True)


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in the state dict; none for a model without adapters."""
    layers = lora_layers(transformer).items()
    return {f"{name}.{part}": layer.get_parameter(part) for name, layer in layers for part in ("lora_A", "lora_B")}


def lora_layers(transformer: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoRALinear)}


def require_lora(transformer: Transformer) -> dict[str, LoRALinear]:
    """The layers that have adapters.

    Raises:
        UserError: none has.
    """
    layers = lora_layers(transformer)
    if not layers:
        raise UserError("transformer: expected one with LoRA adapters, got one without; add_lora or load_lora first")
    return layers


def find_targets(transformer: Transformer, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that `targets` name, in the model's order.

    Raises:
        UserError: a target that matches no linear layer of the blocks, or a model that has adapters.
    """
    if lora_layers(transformer):
        raise UserError("transformer: it has LoRA adapters; merge_lora or remove_lora them before adding others")
    names = [
        name
        for name, module in transformer.named_modules()
        if name.startswith(BLOCKS) and isinstance(module, StackedLinear)
    ]
    for target in targets:
        if not any(is_target(name, target) for name in names):
            kinds = dict.fromkeys(name.split(".", 2)[2] for name in names)
            raise UserError(f"targets: {target!r} is no linear layer of the blocks; there are {', '.join(kinds)}")
    return [name for name in names if any(is_target(name, target) for target in targets)]


def is_target(name: str, target: str) -> bool:
    """Whether a dotted name is the target or ends with it (peft's rule)."""
    return name == target or name.endswith(f".{target}")
