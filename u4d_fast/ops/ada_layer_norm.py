"""Layer norm with a scale and a shift per latent frame: checks, dispatch, tracing and gradients."""

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
from u4d_fast.reference.ada_layer_norm import ada_layer_norm as reference_ada_layer_norm
from u4d_fast.reference.ada_layer_norm import ada_layer_norm_grad, compute_dtype


def ada_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: backends.Backend = "auto"
) -> Tensor:
    """Layer norm of every token without weights, then `* (1 + scale) + shift` with the tables' row of its latent frame.

    A table's row is read for every token of its frame where it lies; it is never expanded. A layer norm with a weight
    and a bias per stream, `[S,D]`, is `scale = (weight - 1)[:, None, None].expand(S, B, 1, D)` and likewise `shift`.
    The arithmetic is float32 (float64 for float64), with one rounding at the end.

    Differentiable in x, shift and scale.

    Args:
        x: [S,B,T,D], T = F*P, tokens ordered frame by frame. D <= 8192 for the kernels.
        shift, scale: [S,B,F,D], any floating dtype (float32 is read in place); any strides, such as a view of
            [S,B,F,6,D] or an expanded tensor.
        eps: added to the variance.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        [S,B,T,D], contiguous, in x's dtype.
    Raises:
        ValueError: shapes disagree, T is no multiple of F, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN); spec.md section 2.
    """
    check_frame_tables(x, shift=shift, scale=scale)
    if resolve("ada_layer_norm", backend, x, shift, scale) == "reference":
        return reference_ada_layer_norm(x, shift, scale, eps)
    normed: Tensor = _launch(x, shift, scale, float(eps))
    return normed


def _kernel(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    shift, scale = kernel_tables(shift, scale)
    out = _output(x)
    pointers = [tensor.data_ptr() for tensor in (x, shift, scale, out)]
    backends.call("ada_layer_norm", x.device, *pointers, *row_sizes(x, scale), *table_strides(shift, scale), eps)
    return out


def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return reference_ada_layer_norm(x, shift, scale, eps).contiguous()


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _output(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, ctx.eps = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    if resolve("ada_layer_norm_grad", "auto", x, grad, scale) == "reference":
        gradients = ada_layer_norm_grad(grad, x, scale, ctx.eps)
    else:
        gradients = _launch_grad(grad, x, scale, ctx.eps)
    grad_x, grad_shift, grad_scale = gradients
    return grad_x.to(x.dtype), grad_shift.to(ctx.shift_dtype), grad_scale.to(scale.dtype), None


def _grad_kernel(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    (table,) = kernel_tables(scale)
    sizes = row_sizes(x, table)
    grad_x, partials = _output(x), partial_sums(table, sizes[4], 2)
    pointers = [tensor.data_ptr() for tensor in (grad, x, table, grad_x, partials)]
    backends.call("ada_layer_norm_grad", x.device, *pointers, *sizes, *table_strides(table), ROWS_PER_PART, eps)
    grad_shift, grad_scale = added_up(partials)
    return grad_x, grad_shift, grad_scale


def _grad_reference(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_shift, grad_scale = ada_layer_norm_grad(grad, x, scale, eps)
    return grad_x.to(x.dtype).contiguous(), grad_shift, grad_scale


def _grad_fake(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x)
    return _output(x), scale.new_empty(scale.shape, dtype=dtype), scale.new_empty(scale.shape, dtype=dtype)


_launch_grad = backends.register(
    "ada_layer_norm_grad",
    "(Tensor grad, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    kernel=_grad_kernel,
    reference=_grad_reference,
    fake=_grad_fake,
    dtypes=backends.SINGLE_AND_HALF,
    reference_backward=True,
)
_launch = backends.register(
    "ada_layer_norm",
    "(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=backends.SINGLE_AND_HALF,
)
