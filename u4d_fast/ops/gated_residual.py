"""A residual update with a gate per latent frame: checks, dispatch, tracing and gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.frame_tables import check_frame_tables, kernel_tables, resolve, row_sizes, table_strides
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
    update, gate = ctx.saved_tensors
    return grad, *gated_residual_grad(grad, update, gate)


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
