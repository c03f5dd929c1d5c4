"""A gated residual update and the adaptive layer norm of its result, in plain torch."""

from __future__ import annotations

from torch import Tensor

from u4d_fast.reference.ada_layer_norm import ada_layer_norm, ada_layer_norm_grad
from u4d_fast.reference.gated_residual import gated_residual, gated_residual_grad


def gated_residual_norm(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Specification of `u4d_fast.gated_residual_norm`: same arguments and results, any floating dtype."""
    x_new = gated_residual(x, update, gate)
    return x_new, ada_layer_norm(x_new, shift, scale, eps)


def gated_residual_norm_grad(
    grad_x_new: Tensor | None,
    grad_normed: Tensor,
    x_new: Tensor,
    update: Tensor,
    gate: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, update and gate, each in its tensor's dtype, and of shift and scale in that of computation.

    Without `grad_x_new` only the norm has a gradient.
    """
    grad_x, grad_shift, grad_scale = ada_layer_norm_grad(grad_normed, x_new, scale, eps)
    if grad_x_new is not None:
        grad_x = grad_x_new.to(grad_x.dtype) + grad_x  # what follows from it is rounded once
    grad_update, grad_gate = gated_residual_grad(grad_x, update, gate)
    return grad_x.to(update.dtype), grad_update, grad_gate, grad_shift, grad_scale
