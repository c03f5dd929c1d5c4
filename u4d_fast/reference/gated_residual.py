"""A residual update with a gate per latent frame, in plain torch."""

from __future__ import annotations

from torch import Tensor

from u4d_fast.reference.ada_layer_norm import by_frame, compute_dtype, per_token


def gated_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Specification of `u4d_fast.gated_residual`: same arguments and results, any floating dtype."""
    wide = x.to(compute_dtype(x))
    gated = by_frame(update.to(wide.dtype), gate) * per_token(gate, wide)
    return (wide + gated.flatten(2, 3)).to(x.dtype)


def gated_residual_grad(grad: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of update and gate, each in its tensor's dtype; that of x is `grad` itself, of any floating dtype."""
    grad_out = by_frame(grad.to(compute_dtype(update)), gate)
    grad_update = (grad_out * per_token(gate, grad_out)).flatten(2, 3)
    grad_gate = (grad_out * by_frame(update.to(grad_out.dtype), gate)).sum(3)
    return grad_update.to(update.dtype), grad_gate.to(gate.dtype)
