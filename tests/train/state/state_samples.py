"""Small models, plain, sharded or with adapters, whose whole training state can be compared."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from u4d import presets
from u4d.model.lora import LoRAConfig, add_lora
from u4d.model.transformer import Transformer
from u4d.train.state.states import Parts, States
from u4d.train.world import World

IDENTITY = {"recipe": "a digest", "base": ""}
NEVER_TRAINED = "link."  # parameters of the test's model that no gradient reaches


def make_parts(seed: int, *, lora: bool = False, sharded: bool = False, device: str = "cpu") -> Parts:
    """A small model of random weights, an average of others, and an optimiser that has not stepped."""
    torch.manual_seed(seed)
    model = Transformer(presets.debug().transformer)
    average = Transformer(presets.debug().transformer)
    for module in (model, average):
        if lora:
            add_lora(module, LoRAConfig(rank=2))
        module.to(device)
        if sharded:  # some by rows, of which three do not divide evenly, others by columns
            for block in module.blocks:
                fully_shard(block, shard_placement_fn=lambda weight: Shard(1 if weight.shape[1] > 1 else 0))
            fully_shard(module)
    average.requires_grad_(False)
    return Parts(model, average, make_optimizer(model))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 3], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim < 3], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)


def change(parts: Parts, step: int) -> None:
    """A step of training as far as states are concerned: it depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in parts.model.named_parameters():
        if parameter.requires_grad and not name.startswith(NEVER_TRAINED):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
    parts.optimizer.step()
    with torch.no_grad():
        for mine, theirs in zip(parts.average.parameters(), parts.model.parameters(), strict=True):
            if theirs.requires_grad:
                mine.lerp_(theirs, 0.1)


def everything(parts: Parts) -> dict[str, Tensor]:
    """All numbers of the parts, whole, copied to the CPU."""
    found = {f"model.{name}": tensor for name, tensor in parts.model.state_dict().items()}
    found |= {f"average.{name}": tensor for name, tensor in parts.average.state_dict().items()}
    for name, parameter in parts.model.named_parameters():
        found |= {f"{key}.{name}": tensor for key, tensor in parts.optimizer.state.get(parameter, {}).items()}
    whole = {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in found.items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in whole.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def open_states(folder: Path, keep: int = 2, **identity: str) -> States:
    return States(folder, keep, World(torch.device("cpu")), IDENTITY | identity)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
