"""RMS norm of queries or keys, then 3-D rotary positions, in attention's layout; in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast.reference.rms_norm import normalised


def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float = 1e-6) -> Tensor:
    """Specification of `u4d_fast.qk_norm_rope`: same arguments and results, any floating dtype."""
    by_head = normalised(x, weight, eps).unflatten(-1, (heads, x.shape[-1] // heads))
    return rotate(by_head, cos, sin).to(x.dtype).transpose(0, 1).flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of `[S,B,T,heads,d]` by the angle that `[T,d/2]` tables hold."""
    cos, sin = (table.to(x.dtype)[:, None] for table in (cos, sin))
    even, odd = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rotate_grad(grad: Tensor, cos: Tensor, sin: Tensor, streams: int) -> Tensor:
    """The gradient `[S,B,T,D]` of `rotate`'s argument, from that of the op's result `[B,S*T,heads,d]`."""
    by_stream = grad.unflatten(1, (streams, grad.shape[1] // streams)).transpose(0, 1)
    return rotate(by_stream, cos, -sin).flatten(-2)
