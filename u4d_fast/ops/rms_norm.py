"""RMS norm over the full width, one scale per stream: checks, dispatch, tracing and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_match, check_shape
from u4d_fast.reference.rms_norm import rms_norm as reference_rms_norm
from u4d_fast.reference.rms_norm import rms_norm_grad

MAX_CHUNKS = 128  # with four streams: a few blocks for each multiprocessor of an H100
GRADIENT_ROW_BYTES = 16384  # of the CUDA kernel, which holds a row in registers


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: backends.Backend = "auto") -> Tensor:
    """Divide every token by its root mean square over all channels and scale it by its stream's weight.

    Wan's `rms_norm_across_heads`, with one weight per stream. The arithmetic is float32 (float64 for float64), with one
    rounding at the end.

    Differentiable in x and weight.

    Args:
        x: [S,B,T,D], any strides; a view whose last dimension is dense is read in place.
        weight: [S,D], of any floating dtype.
        eps: added to the mean square.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        [S,B,T,D], contiguous, in x's dtype.
    Raises:
        ValueError: shapes disagree, or the backend can't be had.
        TypeError: a dtype is not floating.
    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4; the seed, section "Base".
    """
    check_norm(x, weight)
    if backends.resolve("rms_norm", backend, x, weight, dtypes=backends.SINGLE_AND_HALF) == "reference":
        return reference_rms_norm(x, weight, eps)
    normed: Tensor = _launch(x, weight, float(eps))
    return normed


def check_norm(x: Tensor, weight: Tensor) -> None:
    """Check activations `[S,B,T,D]` and the norm's weight `[S,D]`.

    Raises:
        ValueError: shapes disagree.
        TypeError: a dtype is not floating.
    """
    check_shape("x", x, ("S", "B", "T", "D"))
    check_shape("weight", weight, ("S", "D"))
    check_match("weight", weight, (x.shape[0], x.shape[3]), "x", x)
    check_floating(x=x, weight=weight)


def readable_by_kernel(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x with dense channels; weight dense, in x's dtype or else in float32, the two that the kernels read."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if weight.dtype != x.dtype:
        weight = weight.float()
    return x, weight.contiguous()


def type_codes(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """How the kernels are told the dtypes of x and weight."""
    return backends.DTYPE_CODES[x.dtype], backends.DTYPE_CODES[weight.dtype]


def _kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = readable_by_kernel(x, weight)
    out = _output(x)
    backends.call(
        "rms_norm",
        x.device,
        *(tensor.data_ptr() for tensor in (x, weight, out)),
        *type_codes(x, weight),
        *x.shape,
        *x.stride()[:3],
        eps,
    )
    return out


def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference_rms_norm(x, weight, eps).contiguous()


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _output(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if has_kernel("rms_norm_grad", x):
        grad_x, grad_weight = _launch_grad(grad, x, weight, ctx.eps)
    else:
        grad_x, grad_weight = rms_norm_grad(grad, x, weight, ctx.eps)
    return grad_x, grad_weight, None


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether a backward pass has a kernel for x; it has no `backend` argument to obey."""
    index = -1 if x.device.index is None else x.device.index
    return x.dtype in backends.SINGLE_AND_HALF and not backends.unavailable(op, x.device.type, index)


def gradient_fits(part: int, x: Tensor, *others: Tensor) -> bool:
    """Whether the gradient's kernel takes x and the dense tensors beside it; on a GPU it reads 16-byte vectors only.

    `part` is the number of channels that belong together: a row, or a head.
    """
    if x.numel() == 0:
        return False
    if x.device.type != "cuda":
        return True
    size = 16 // x.element_size()
    whole = all(number % size == 0 for number in (part, *x.stride()[:3]))
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (x, *others))
    return whole and aligned and x.shape[3] * x.element_size() <= GRADIENT_ROW_BYTES


def partial_sums(x: Tensor) -> Tensor:
    """Room for the weight's gradient, one row for each chunk of tokens: their number depends on the shape alone."""
    streams, batch, tokens, width = x.shape
    chunks = max(1, min(MAX_CHUNKS, batch * tokens // 8))
    return torch.empty(chunks, streams, width, dtype=torch.float32, device=x.device)


def _grad_kernel(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, _ = readable_by_kernel(x, weight)
    scale, grad = weight.float().contiguous(), grad.contiguous()
    if not gradient_fits(x.shape[3], x, grad, scale):
        return rms_norm_grad(grad, x, weight, eps)
    grad_x, partial = _output(x), partial_sums(x)
    backends.call(
        "rms_norm_grad",
        x.device,
        *(tensor.data_ptr() for tensor in (grad, x, scale, grad_x, partial)),
        backends.DTYPE_CODES[x.dtype],
        *x.shape,
        *x.stride()[:3],
        partial.shape[0],
        eps,
    )
    return grad_x, partial.sum(0).to(weight.dtype)


def _grad_fake(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _output(x), weight.new_empty(weight.shape)


def _grad_reference(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = rms_norm_grad(grad, x, weight, eps)
    return grad_x.contiguous(), grad_weight


_launch_grad = backends.register(
    "rms_norm_grad",
    "(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    kernel=_grad_kernel,
    reference=_grad_reference,
    fake=_grad_fake,
    dtypes=backends.SINGLE_AND_HALF,
    reference_backward=True,
)
_launch = backends.register(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=backends.SINGLE_AND_HALF,
)
