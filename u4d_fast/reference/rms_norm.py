"""RMS norm over the full width, one scale per stream, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast.reference.ada_layer_norm import compute_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Specification of `u4d_fast.rms_norm`: same arguments and results, any floating dtype."""
    return normalised(x, weight, eps).to(x.dtype)


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight`, not yet rounded to x's dtype."""
    wide = x.to(compute_dtype(x))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse * weight.to(wide.dtype)[:, None, None]


def rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight by the chain rule written out; those of the op's kernels are no less exact.

    Args:
        grad: `[S,B,T,D]`, in any floating dtype: of the result before it was rounded.
        x, weight, eps: as they were given to `rms_norm`.
    Returns:
        `[S,B,T,D]` in x's dtype and `[S,D]` in weight's.
    """
    dtype = compute_dtype(x)
    wide, grad = x.to(dtype), grad.to(dtype)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * inverse
    grad_unit = grad * weight.to(dtype)[:, None, None]
    grad_x = (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True)) * inverse
    return grad_x.to(x.dtype), (grad * unit).sum((1, 2)).to(weight.dtype)
