"""RMS norm over channels, SiLU and two earlier frames in front: checks, dispatch, tracing and gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_match, check_shape, describe
from u4d_fast.reference.causal_norm_silu import FRONT, activated_grad, widened
from u4d_fast.reference.causal_norm_silu import causal_norm_silu as reference_causal_norm_silu
from u4d_fast.reference.causal_norm_silu import residual_causal_norm_silu as reference_residual_causal_norm_silu

OP = "causal_norm_silu"


def causal_norm_silu(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    *,
    backend: backends.Backend = "auto",
) -> Tensor:
    """`silu(rms_norm(x + bias) * gamma)` over channels, behind two earlier frames: what a causal convolution reads.

    Wan's VAE has it before every convolution over 3x3x3. Norm, activation, the convolution's causal padding and the
    bias of the convolution before are one pass over memory. The arithmetic is float32 (float64 for float64), with one
    rounding at the end.

    Differentiable in all tensors.

    Args:
        x: [B,T,H,W,C], channels last.
        gamma: [C], any floating dtype.
        bias: [C], added to x first; None: nothing.
        before: [B,2,H,W,C] in x's dtype, put in front as they are; None: zeros, as at a clip's beginning.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        [B,2+T,H,W,C], contiguous, in x's dtype.
    Raises:
        ValueError: shapes disagree, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; diffusers' autoencoder_kl_wan.py.
    """
    _check(x, gamma, bias, before)
    if _choose(backend, x, gamma, bias, before) == "reference":
        return reference_causal_norm_silu(x, gamma, bias, before)
    normed: Tensor = _launch(x, gamma, bias, None, before)[1]
    return normed


def residual_causal_norm_silu(
    x: Tensor,
    update: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    before: Tensor | None = None,
    *,
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`x + update + bias`, and `causal_norm_silu` of it as it was rounded, in the same pass over memory.

    Differentiable in all tensors.

    Args:
        x: [B,T,H,W,C], channels last.
        update: like x, in its dtype; `bias` belongs to it.
        gamma, bias, before, backend: as in `causal_norm_silu`.
    Returns:
        The sum [B,T,H,W,C] and [B,2+T,H,W,C], contiguous, in x's dtype.
    Raises:
        ValueError: shapes disagree, or the backend can't be had.
        TypeError: a dtype is wrong.
    """
    _check(x, gamma, bias, before)
    check_match("update", update, x.shape, "x", x)
    _check_dtype("update", update, x)
    if _choose(backend, x, update, gamma, bias, before) == "reference":
        return reference_residual_causal_norm_silu(x, update, gamma, bias, before)
    total, normed = _launch(update, gamma, bias, x, before)
    return total, normed


def _check(x: Tensor, gamma: Tensor, bias: Tensor | None, before: Tensor | None) -> None:
    """Check what both ops take.

    Raises:
        ValueError: shapes disagree.
        TypeError: a dtype is not floating, or not x's where it must be.
    """
    check_shape("x", x, ("B", "T", "H", "W", "C"))
    check_match("gamma", gamma, x.shape[-1:], "x", x)
    check_floating(x=x, gamma=gamma)
    if bias is not None:
        check_match("bias", bias, x.shape[-1:], "x", x)
        check_floating(bias=bias)
    if before is not None:
        check_match("before", before, (x.shape[0], FRONT, *x.shape[2:]), "x", x)
        _check_dtype("before", before, x)


def _check_dtype(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise TypeError unless a tensor has x's dtype."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} like x {describe(x.shape)}, got {tensor.dtype}")


def _choose(backend: str, *tensors: Tensor | None) -> str:
    """The implementation that a call takes."""
    given = [tensor for tensor in tensors if tensor is not None]
    return backends.resolve(OP, backend, *given, dtypes=backends.SINGLE_AND_HALF)


def _kernel(
    x: Tensor, gamma: Tensor, bias: Tensor | None, residual: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    total, normed = outputs = _outputs(x, residual)
    rows = [None if part is None else part.contiguous() for part in (x, residual, before)]
    # The kernels read gamma and bias in x's dtype or else in float32.
    same = gamma.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    tables = [None if part is None else (part if same else part.float()).contiguous() for part in (gamma, bias)]
    pointers = [0 if part is None else part.data_ptr() for part in (*rows, *tables, total, normed)]
    dtypes = backends.DTYPE_CODES[x.dtype], backends.DTYPE_CODES[x.dtype if same else torch.float32]
    pixels = math.prod(x.shape[2:4])
    backends.call(OP, x.device, *pointers, *dtypes, x.shape[0], x.shape[1] * pixels, FRONT * pixels, x.shape[4])
    return outputs


def _outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the sum, which is empty where nothing asks for it, and for what the convolution reads."""
    batch, frames, *rest = x.shape
    total = x.new_empty(0 if residual is None else x.shape)
    return total, x.new_empty(batch, FRONT + frames, *rest)


def _reference(
    x: Tensor, gamma: Tensor, bias: Tensor | None, residual: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    if residual is None:
        return x.new_empty(0), reference_causal_norm_silu(x, gamma, bias, before)
    return reference_residual_causal_norm_silu(residual, x, gamma, bias, before)


def _fake(
    x: Tensor, gamma: Tensor, bias: Tensor | None, residual: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _outputs(x, residual)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, bias, residual, before = inputs
    ctx.given = tuple(part is not None for part in (bias, residual, before))
    ctx.bias_dtype = None if bias is None else bias.dtype
    if residual is None:
        ctx.save_for_backward(x, gamma, bias)
    else:
        ctx.save_for_backward(output[0], gamma, None)  # the norm is of the sum as it was rounded


def _backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    rows, gamma, bias = ctx.saved_tensors
    has_bias, has_residual, has_before = ctx.given
    grad, grad_gamma = activated_grad(grad_normed[:, FRONT:], widened(rows, bias), gamma)
    if has_residual:
        grad = grad + grad_total
    grad_rows = grad.to(rows.dtype)
    return (
        grad_rows,
        grad_gamma.to(gamma.dtype),
        grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if has_bias else None,
        grad_rows if has_residual else None,
        grad_normed[:, :FRONT] if has_before else None,
    )


_launch = backends.register(
    OP,
    "(Tensor x, Tensor gamma, Tensor? bias, Tensor? residual, Tensor? before) -> (Tensor total, Tensor normed)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=backends.SINGLE_AND_HALF,
)
