"""RMS norm over channels and SiLU, with two earlier frames in front for a causal convolution, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import silu

from u4d_fast.reference.ada_layer_norm import compute_dtype

FRONT = 2  # frames that a causal convolution over three sees before the first
LEAST_NORM = 1e-12  # as torch.nn.functional.normalize has it


def causal_norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """Specification of `u4d_fast.causal_norm_silu`: same arguments and results, any floating dtype."""
    return in_front(before, activated(widened(x, bias), gamma).to(x.dtype))


def residual_causal_norm_silu(
    x: Tensor, update: Tensor, gamma: Tensor, bias: Tensor | None = None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Specification of `u4d_fast.residual_causal_norm_silu`: same arguments and results, any floating dtype."""
    total = (widened(update, bias) + x.to(compute_dtype(x))).to(x.dtype)
    return total, causal_norm_silu(total, gamma, before=before)


def widened(x: Tensor, bias: Tensor | None) -> Tensor:
    """x, with the bias if there is one, in the dtype of computation."""
    wide = x.to(compute_dtype(x))
    return wide if bias is None else wide + bias.to(wide.dtype)


def activated(wide: Tensor, gamma: Tensor) -> Tensor:
    """Every pixel's channels divided by their root mean square, scaled and activated; not rounded."""
    norm = wide.square().sum(-1, keepdim=True).sqrt().clamp_min(LEAST_NORM)
    return silu(wide * (math.sqrt(wide.shape[-1]) / norm) * gamma.to(wide.dtype))


def in_front(before: Tensor | None, frames: Tensor) -> Tensor:
    """`[B,2,H,W,C]` (zeros if None) and `[B,T,H,W,C]` -> `[B,2+T,H,W,C]`."""
    if before is None:
        before = frames.new_zeros(frames.shape[0], FRONT, *frames.shape[2:])
    return torch.cat((before, frames), dim=1)


def activated_grad(grad: Tensor, wide: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `activated` by the chain rule written out: of its rows, and of gamma summed over them.

    With y the row of length 1 and g its gradient, that of the row is (g - y (g . y)) / norm.
    """
    norm = wide.square().sum(-1, keepdim=True).sqrt()
    inverse = 1 / norm.clamp_min(LEAST_NORM)
    unit, scale = wide * inverse, math.sqrt(wide.shape[-1]) * gamma.to(wide.dtype)
    sigmoid = torch.sigmoid(unit * scale)
    grad_scaled = grad.to(wide.dtype) * sigmoid * (1 + unit * scale * (1 - sigmoid))
    grad_unit = grad_scaled * scale
    along = (grad_unit * unit).sum(-1, keepdim=True) * (norm > LEAST_NORM)
    grad_gamma = (grad_scaled * unit).flatten(0, -2).sum(0) * math.sqrt(wide.shape[-1])
    return (grad_unit - unit * along) * inverse, grad_gamma
