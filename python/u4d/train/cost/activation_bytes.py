"""Bytes that one forward and backward pass keep alive, counted on the meta device: no GPU and no memory is needed.

The pass is the real one: the model's own code, the policy that training uses, autograd's own choice of what to save.
Only two things are imitated, since the meta device has neither: products in bfloat16, and fused attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from u4d.diffusion.flow import LATENT_CHANNELS, STREAMS
from u4d.live_bytes import LiveBytes
from u4d.memory import as_loaded
from u4d.model.codec import CELL
from u4d.model.lora import LoRAConfig, add_lora
from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig
from u4d.train.activations import keep_activations
from u4d_fast.time_layout import latent_frames

PRODUCTS = (torch.baddbmm, torch.bmm)


class FusedProducts(TorchFunctionMode):
    """Products in a dtype, as autocast without its cache has them; attention as one operation with a small result."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            return func(*(part.to(self.dtype) for part in args), **kwargs)
        if func is scaled_dot_product_attention:
            # Which fused kernel does not matter: each one keeps its inputs, its result and a number for each query.
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], **kwargs)[0]
        return func(*args, **kwargs)


def training_model(config: TransformerConfig, lora_rank: int | None = None) -> Transformer:
    """A model as it is trained, on the meta device: float32, or adapters over frozen weights as they are loaded."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = Transformer(config)
        if lora_rank is not None:
            as_loaded(model, torch.bfloat16)
            add_lora(model, LoRAConfig(rank=lora_rank, alpha=lora_rank))
    model.train()
    return model


@cache
def activation_bytes(
    config: TransformerConfig, frames: int, clips: int, policy: str, precision: str, lora_rank: int | None = None
) -> int:
    """Most bytes alive in a forward and backward pass, the copies of weights that autograd keeps included.

    Gradients of weights are counted only while they are made. Operations are counted one by one, as without
    `torch.compile`, which fuses many of them and keeps less. Local motion (tiny's) is left out: some images' worth.

    Args:
        config: sizes.
        frames, clips: of the micro-batch.
        policy: see `keep_activations`.
        precision: "bf16" or "fp32".
        lora_rank: of adapters, if they alone are trained.
    """
    model = training_model(replace(config, motion_features=False), lora_rank)
    keep_activations(model, policy)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    parts: list[Any] = [model, *model.blocks]
    for part in parts:  # blocks too: some are run again in the backward pass
        part.forward = with_products(part.forward, dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    height, width = (side // CELL for side in config.image_size)
    groups = latent_frames(frames)
    with LiveBytes() as counted:
        latents = torch.empty(clips, len(STREAMS), LATENT_CHANNELS, groups, height, width, device="meta")
        times = torch.empty(clips, len(STREAMS), groups, device="meta")
        model(latents, times).float().square().mean().backward()
    return counted.peak


def with_products(forward: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """A module's forward with `FusedProducts`, also where a checkpoint calls it again."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with FusedProducts(dtype):
            return forward(*args, **kwargs)

    return run


def drop_gradient(parameter: Tensor) -> None:
    """Gradients are accounted for by themselves: they live longer, and in parts."""
    parameter.grad = None


def parameter_bytes(module: nn.Module, *, trained: bool | None = None) -> int:
    """Bytes of a module's parameters: all, the trained, or the frozen ones."""
    return sum(
        parameter.nbytes for parameter in module.parameters() if trained is None or parameter.requires_grad == trained
    )
