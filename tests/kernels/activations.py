"""Activations `[S,B,T,D]` for the tests of the ops of a transformer block, in any layout that a view can have."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]


def activations(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal values; every token has its own magnitude, and one token is all zeros."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=g, dtype=torch.float64)
    values = values * torch.rand(*shape[:-1], 1, generator=g, dtype=torch.float64).mul(6).sub(3).exp()
    if values.numel():
        values[-1, -1, -1] = 0
    return values.to(dtype)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values `[S,B,T,D]` in other places of memory."""
    streams, batch, tokens, width = x.shape
    side_by_side = x.new_full((streams, batch, tokens, 3 * width), torch.nan)
    side_by_side[..., width : 2 * width] = x
    shifted = x.new_full((x.numel() + 1,), torch.nan)
    shifted[1:] = x.flatten()
    return {
        "a part of q, k, v side by side": side_by_side[..., width : 2 * width],
        "clips before streams": x.transpose(0, 1).contiguous().transpose(0, 1),
        "tokens before streams": x.movedim(2, 0).contiguous().movedim(0, 2),
        "channels not dense": x.mT.contiguous().mT,
        "not aligned": shifted[1:].view_as(x),
    }
