"""Bias and tanh GELU: checks, dispatch, tracing and gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_match, check_shape, check_tensor, describe
from u4d_fast.reference.bias_gelu import bias_gelu as reference_bias_gelu
from u4d_fast.reference.bias_gelu import bias_gelu_grad

ROWS_PER_PART = 64
"""Rows of a stream that one task of the backward kernel adds up. Part of the result's bits, so a constant."""


def bias_gelu(x: Tensor, bias: Tensor, *, inplace: bool = False, backend: backends.Backend = "auto") -> Tensor:
    """`gelu(x + bias)` with the tanh form of GELU, and a bias per stream.

    The arithmetic is float32 (float64 for float64), with one rounding at the end.

    Differentiable in x and bias.

    Args:
        x: [S,...,D], at least three dimensions.
        bias: [S,D], any floating dtype.
        inplace: write into x and return x; only where no gradient is wanted.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        Like x; contiguous where it is a new tensor.
    Raises:
        ValueError: shapes disagree, a gradient is wanted in place, or the backend can't be had.
        TypeError: a dtype is not floating.
    Source:
        Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.
    """
    check_biased(x, bias)
    if inplace and torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        raise ValueError("inplace: expected no wanted gradient, got x or bias with requires_grad; use torch.no_grad()")
    if backends.resolve("bias_gelu", backend, x, bias, dtypes=backends.SINGLE_AND_HALF) == "reference":
        return reference_bias_gelu(x, bias, inplace)
    if inplace:
        _launch_inplace(x, bias)
        return x
    activated: Tensor = _launch(x, bias)
    return activated


def check_biased(x: Tensor, bias: Tensor) -> None:
    """Check activations `[S,...,D]` and a bias per stream `[S,D]`.

    Raises:
        ValueError: shapes disagree.
        TypeError: a dtype is not floating.
    """
    check_shape("bias", bias, ("S", "D"))
    check_tensor("x", x, ("S", "...", "D"))
    if x.ndim < 3:
        raise ValueError(f"x: expected [S,...,D] with at least three dimensions, got {describe(x.shape)}")
    check_match("bias", bias, (x.shape[0], x.shape[-1]), "x", x)
    check_floating(x=x, bias=bias)


def _kernel(x: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous()
    out = _output(x)
    call_biased("bias_gelu", x, bias, out)
    return out


def _inplace(x: Tensor, bias: Tensor) -> None:
    # Its kernel is bias_gelu's, so it asks for that one by itself: a saved program may run where there is none.
    if backends.resolve("bias_gelu", "auto", x, bias, dtypes=backends.SINGLE_AND_HALF) == "reference":
        reference_bias_gelu(x, bias, inplace=True)
    elif x.is_contiguous():
        call_biased("bias_gelu", x, bias, x)
        torch.autograd.graph.increment_version(x)  # a graph that saved x must notice
    else:
        x.copy_(_kernel(x, bias))


def call_biased(op: str, x: Tensor, bias: Tensor, *outputs: Tensor) -> None:
    """Run a kernel of contiguous activations and their bias, which it reads in x's dtype or else in float32."""
    bias = (bias if bias.dtype == x.dtype else bias.float()).contiguous()
    pointers = [tensor.data_ptr() for tensor in (x, bias, *outputs)]
    dtypes = backends.DTYPE_CODES[x.dtype], backends.DTYPE_CODES[bias.dtype]
    backends.call(op, x.device, *pointers, *dtypes, x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _reference(x: Tensor, bias: Tensor) -> Tensor:
    return reference_bias_gelu(x, bias).contiguous()


def _fake(x: Tensor, bias: Tensor) -> Tensor:
    return _output(x)


def _fake_inplace(x: Tensor, bias: Tensor) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    x, bias = ctx.saved_tensors
    if backends.resolve("bias_gelu_grad", "auto", grad, x, bias, dtypes=backends.SINGLE_AND_HALF) == "reference":
        return bias_gelu_grad(grad, x, bias)
    grad_x, grad_bias = _launch_grad(grad, x, bias)
    return grad_x, grad_bias


def _grad_kernel(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, wide_bias = grad.contiguous(), x.contiguous(), bias.float().contiguous()
    streams, rows, width = x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]
    grad_x, partials = _output(x), wide_bias.new_empty(-(-rows // ROWS_PER_PART), *bias.shape)
    pointers = [tensor.data_ptr() for tensor in (grad, x, wide_bias, grad_x, partials)]
    sizes = backends.DTYPE_CODES[x.dtype], streams, rows, width
    backends.call("bias_gelu_grad", x.device, *pointers, *sizes, ROWS_PER_PART)
    return grad_x, partials.sum(0).to(bias.dtype)


def _grad_reference(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_bias = bias_gelu_grad(grad, x, bias)
    return grad_x.contiguous(), grad_bias


def _grad_fake(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _output(x), bias.new_empty(bias.shape)


_launch_grad = backends.register(
    "bias_gelu_grad",
    "(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    kernel=_grad_kernel,
    reference=_grad_reference,
    fake=_grad_fake,
    dtypes=backends.SINGLE_AND_HALF,
    reference_backward=True,
)
_launch = backends.register(
    "bias_gelu",
    "(Tensor x, Tensor bias) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=backends.SINGLE_AND_HALF,
)
_launch_inplace = backends.register(
    "bias_gelu_inplace",
    "(Tensor(a!) x, Tensor bias) -> ()",
    kernel=_inplace,
    reference=_inplace,
    fake=_fake_inplace,
    dtypes=backends.SINGLE_AND_HALF,
)
