"""A gated residual update and the adaptive layer norm of its result: checks, dispatch, tracing and gradients."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
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
from u4d_fast.ops.gated_residual import gate_gradients
from u4d_fast.reference.ada_layer_norm import compute_dtype
from u4d_fast.reference.gated_residual_norm import gated_residual_norm as reference_gated_residual_norm
from u4d_fast.reference.gated_residual_norm import gated_residual_norm_grad

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, update, gate, shift and scale."""


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
    ctx.set_materialize_grads(False)  # a result that nobody used has no gradient to read
    ctx.save_for_backward(output[0], update, gate, scale)


def _backward(ctx: Any, grad_x_new: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    x_new, update, gate, scale = ctx.saved_tensors
    if grad_normed is None:
        if grad_x_new is None:
            return (None,) * 6
        return grad_x_new, *gate_gradients(grad_x_new, update, gate), None, None, None
    given = (grad_x_new, grad_normed, x_new, update, gate, scale, ctx.eps)
    tensors = [tensor for tensor in given if isinstance(tensor, Tensor)]
    kernel = resolve("gated_residual_norm_grad", "auto", x_new, *tensors) != "reference"
    *gradients, grad_shift, grad_scale = (_launch_grad if kernel else gated_residual_norm_grad)(*given)
    return *gradients, grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype), None


def _grad_kernel(
    grad_x_new: Tensor | None,
    grad_normed: Tensor,
    x_new: Tensor,
    update: Tensor,
    gate: Tensor,
    scale: Tensor,
    eps: float,
) -> Gradients:
    rows = [tensor.contiguous() for tensor in (grad_normed, x_new, update)]
    direct = None if grad_x_new is None else grad_x_new.contiguous()
    tables = kernel_tables(gate, scale)
    sizes = row_sizes(x_new, gate)
    grad_x, grad_update = _outputs(x_new)
    partials = partial_sums(gate, sizes[4], 3)
    pointers = [tensor.data_ptr() for tensor in (*rows, *tables, grad_x, grad_update, partials)]
    backends.call(
        "gated_residual_norm_grad",
        x_new.device,
        0 if direct is None else direct.data_ptr(),
        *pointers,
        *sizes,
        *table_strides(*tables),
        ROWS_PER_PART,
        eps,
    )
    grad_gate, grad_shift, grad_scale = added_up(partials)
    return grad_x, grad_update, grad_gate.to(gate.dtype), grad_shift, grad_scale


def _grad_reference(*given: Any) -> Gradients:
    grad_x, grad_update, *tables = gated_residual_norm_grad(*given)
    grad_gate, grad_shift, grad_scale = tables
    return grad_x.contiguous(), grad_update.contiguous(), grad_gate, grad_shift, grad_scale


def _grad_fake(
    grad_x_new: Tensor | None, grad_normed: Tensor, x_new: Tensor, update: Tensor, gate: Tensor, *_: Any
) -> Gradients:
    wide = gate.new_empty(gate.shape, dtype=compute_dtype(x_new))
    return *_outputs(x_new), gate.new_empty(gate.shape), wide, torch.empty_like(wide)


_launch_grad = backends.register(
    "gated_residual_norm_grad",
    "(Tensor? grad_x_new, Tensor grad_normed, Tensor x_new, Tensor update, Tensor gate, Tensor scale, float eps)"
    " -> (Tensor grad_x, Tensor grad_update, Tensor grad_gate, Tensor grad_shift, Tensor grad_scale)",
    kernel=_grad_kernel,
    reference=_grad_reference,
    fake=_grad_fake,
    dtypes=backends.SINGLE_AND_HALF,
    reference_backward=True,
)
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
