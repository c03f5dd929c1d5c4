"""Small models with random weights and random inputs, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig


def small_config(**changes: Any) -> TransformerConfig:
    """Two layers of width 24."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 40,
        "text_dim": 8,
        "freq_dim": 16,
    }
    return TransformerConfig(**sizes | changes)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Give every parameter a random value that keeps activations near one, so that none is without effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("weight"):
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.2 * noise)
    return module


def random_transformer(seed: int = 0, **changes: Any) -> Transformer:
    """A small model in which every parameter has an effect."""
    return randomise(Transformer(small_config(**changes)), seed).eval()


def random_inputs(
    batch: int = 1, frames: int = 3, size: tuple[int, int] = (4, 6), seed: int = 0, text_tokens: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents `[B,4,16,F,h,w]`, times `[B,4,F]`, text `[B,T,8]`."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, 16, frames, *size, generator=generator)
    times = torch.rand(batch, 4, frames, generator=generator)
    return latents, times, torch.randn(batch, text_tokens, 8, generator=generator)


def own_stream_mask(batch: int, frames: int) -> Tensor:
    """`[B,4F,4F]`: every stream sees only itself."""
    stream = torch.arange(4).repeat_interleave(frames)
    return (stream[:, None] == stream).expand(batch, -1, -1)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest deviation over the largest value."""
    return float((value - truth).abs().max() / truth.abs().max())
