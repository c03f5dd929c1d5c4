"""A residual update with a gate per latent frame: checks, dispatch, tracing and gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.frame_tables import (
    ROWS_PER_PART,
    added_up,
    check_frame_tables,
    kernel_tables,
    partial_sums,
    resolve,
    row_sizes,
    table_strides,
)
from u4d_fast.reference.gated_residual import gated_residual as reference_gated_residual
from u4d_fast.reference.gated_residual import gated_residual_grad


def gated_residual(x: Tensor, update: Tensor, gate: Tensor, *, backend: backends.Backend = "auto") -> Tensor:
    """`x + update * gate`, with the gate's row of each token's latent frame.

    The gate is read where it lies and never expanded. The arithmetic is float32 (float64 for float64), with one
    rounding at the end.

    Differentiable in x, update and gate.

    Args:
        x: [S,B,T,D], T = F*P, tokens ordered frame by frame. D <= 8192 for the kernels.
        update: like x, in its dtype.
        gate: [S,B,F,D], any floating dtype (float32 is read in place), any strides.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        [S,B,T,D], contiguous, in x's dtype.
    Raises:
        ValueError: shapes disagree, T is no multiple of F, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2; spec.md section 2.
    """
    check_frame_tables(x, update=update, gate=gate)
    if resolve("gated_residual", backend, x, update, gate) == "reference":
        return reference_gated_residual(x, update, gate)
    x_new: Tensor = _launch(x, update, gate)
    return x_new


def _kernel(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    x, update = x.contiguous(), update.contiguous()
    (gate,) = kernel_tables(gate)
    out = _output(x)
    pointers = [tensor.data_ptr() for tensor in (x, update, gate, out)]
    backends.call("gated_residual", x.device, *pointers, *row_sizes(x, gate), *table_strides(gate))
    return out


def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _reference(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return reference_gated_residual(x, update, gate).contiguous()


def _fake(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return _output(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, update, gate = inputs
    ctx.save_for_backward(update, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return grad, *gate_gradients(grad, *ctx.saved_tensors)


def gate_gradients(grad: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of update and gate, each in its tensor's dtype; that of x is `grad` itself."""
    if resolve("gated_residual_grad", "auto", update, grad, gate) == "reference":
        return gated_residual_grad(grad, update, gate)
    grad_update, grad_gate = _launch_grad(grad, update, gate)
    return grad_update, grad_gate


def _grad_kernel(grad: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grad, update = grad.contiguous(), update.contiguous()
    (table,) = kernel_tables(gate)
    sizes = row_sizes(update, table)
    grad_update, partials = _output(update), partial_sums(table, sizes[4], 1)
    pointers = [tensor.data_ptr() for tensor in (grad, update, table, grad_update, partials)]
    backends.call("gated_residual_grad", update.device, *pointers, *sizes, *table_strides(table), ROWS_PER_PART)
    (grad_gate,) = added_up(partials)
    return grad_update, grad_gate.to(gate.dtype)


def _grad_reference(grad: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grad_update, grad_gate = gated_residual_grad(grad, update, gate)
    return grad_update.contiguous(), grad_gate


def _grad_fake(grad: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return _output(update), gate.new_empty(gate.shape)


_launch_grad = backends.register(
    "gated_residual_grad",
    "(Tensor grad, Tensor update, Tensor gate) -> (Tensor, Tensor)",
    kernel=_grad_kernel,
    reference=_grad_reference,
    fake=_grad_fake,
    dtypes=backends.SINGLE_AND_HALF,
    reference_backward=True,
)
_launch = backends.register(
    "gated_residual",
    "(Tensor x, Tensor update, Tensor gate) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=backends.SINGLE_AND_HALF,
)
