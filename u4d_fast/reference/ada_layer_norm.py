"""Layer norm with a scale and a shift per latent frame, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Specification of `u4d_fast.ada_layer_norm`: same arguments and results, any floating dtype."""
    normed = layer_norm(x.to(compute_dtype(x)), x.shape[-1:], eps=eps)
    modulated = by_frame(normed, scale) * (1 + per_token(scale, normed)) + per_token(shift, normed)
    return modulated.flatten(2, 3).to(x.dtype)


def ada_layer_norm_grad(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale, by the chain rule written out, in the dtype of computation.

    With y the normalised row and g its gradient, that of the row is (g - mean(g) - y mean(g y)) / deviation.
    """
    wide = x.to(compute_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * inverse
    grad_out = by_frame(grad.to(wide.dtype), scale)
    grad_normed = (grad_out * (1 + per_token(scale, wide))).flatten(2, 3)
    along = (grad_normed * normed).mean(-1, keepdim=True)
    grad_x = (grad_normed - grad_normed.mean(-1, keepdim=True) - normed * along) * inverse
    grad_scale = (grad_out * by_frame(normed, scale)).sum(3)
    return grad_x, grad_out.sum(3), grad_scale


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the element-wise ops of a block compute in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_frame(x: Tensor, table: Tensor) -> Tensor:
    """`[S,B,F*P,D]` -> `[S,B,F,P,D]`, with the F of a table `[S,B,F,D]`."""
    frames = table.shape[2]
    split: Tensor = x.unflatten(2, (frames, x.shape[2] // frames))
    return split


def per_token(table: Tensor, like: Tensor) -> Tensor:
    """A table `[S,B,F,D]` in the dtype of `like`, as a view that broadcasts over the P tokens of a frame."""
    wide: Tensor = table.to(like.dtype)[..., None, :]
    return wide
