"""A gated residual update and the adaptive layer norm of its result: checks, dispatch, tracing and gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.frame_tables import check_frame_tables, kernel_tables, resolve, row_sizes, table_strides
from u4d_fast.ops.ada_layer_norm import norm_gradients
from u4d_fast.reference.ada_layer_norm import compute_dtype
from u4d_fast.reference.gated_residual import gated_residual_grad
from u4d_fast.reference.gated_residual_norm import gated_residual_norm as reference_gated_residual_norm


def gated_residual_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and the `ada_layer_norm` of its result in one pass over memory.

    The norm is of the result as it was rounded, so both outputs are those of the two ops one after the other.

    Differentiable in x, update, gate, shift and scale.

    Args:
        x: [S,B,T,D], T = F*P, tokens ordered frame by frame. D <= 8192 for the kernels.
        update: like x, in its dtype.
        gate, shift, scale: [S,B,F,D], any floating dtype (float32 is read in place); any strides.
        eps: added to the variance.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        x_new = x + update * gate and its norm, each [S,B,T,D], contiguous, in x's dtype.
    Raises:
        ValueError: shapes disagree, T is no multiple of F, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2; spec.md section 2.
    """
    check_frame_tables(x, update=update, gate=gate, shift=shift, scale=scale)
    if resolve("gated_residual_norm", backend, x, update, gate, shift, scale) == "reference":
        return reference_gated_residual_norm(x, update, gate, shift, scale, eps)
    x_new, normed = _launch(x, update, gate, shift, scale, float(eps))
    return x_new, normed


def _kernel(x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, update = x.contiguous(), update.contiguous()
    tables = kernel_tables(gate, shift, scale)
    outputs = _outputs(x)
    pointers = [tensor.data_ptr() for tensor in (x, update, *tables, *outputs)]
    backends.call("gated_residual_norm", x.device, *pointers, *row_sizes(x, gate), *table_strides(*tables), eps)
    return outputs


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _reference(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x_new, normed = reference_gated_residual_norm(x, update, gate, shift, scale, eps)
    return x_new.contiguous(), normed.contiguous()


def _fake(x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _outputs(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, update, gate, shift, scale, ctx.eps = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(output[0], update, gate, scale)


def _backward(ctx: Any, grad_x_new: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    x_new, update, gate, scale = ctx.saved_tensors
    through_norm, grad_shift, grad_scale = norm_gradients(grad_normed, x_new, scale, ctx.eps)
    grad_x = grad_x_new.to(compute_dtype(x_new)) + through_norm  # what follows from it is rounded once
    of_gate = gated_residual_grad(grad_x, update, gate)
    return grad_x.to(update.dtype), *of_gate, grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype), None


_launch = backends.register(
    "gated_residual_norm",
    "(Tensor x, Tensor update, Tensor gate, Tensor shift, Tensor scale, float eps) -> (Tensor x_new, Tensor normed)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=backends.SINGLE_AND_HALF,
)
