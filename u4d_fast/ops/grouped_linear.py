"""Linear layers of several streams, each with a weight of its own: checks, dispatch, tracing and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_match, check_shape, check_tensor, describe
from u4d_fast.fp8 import Fp8Rows, refuse_gradients
from u4d_fast.reference.grouped_linear import grouped_linear as reference_grouped_linear
from u4d_fast.reference.grouped_linear import grouped_linear_fp8 as reference_grouped_linear_fp8
from u4d_fast.reference.grouped_linear import grouped_linear_grad
from u4d_fast.scaled_mm import scaled_mm_by_stream, takes_scaled_mm

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn

# What the CUDA kernels take; csrc/kernels/grouped_linear/grouped_linear.h.
BIAS_DTYPES = (torch.float32, torch.bfloat16)

# Whether "auto" takes our kernels on CUDA. torch has cuBLAS' for both: not before ours have been measured to be faster.
BF16_BY_KERNEL = False
FP8_BY_KERNEL = False


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, backend: backends.Backend = "auto"
) -> Tensor:
    """`x @ weight.mT + bias` in every stream, then GELU (its tanh form) if wanted.

    Differentiable in x, weight and bias.

    Args:
        x: [S,...,K], at least three dimensions: float32, float64, bfloat16 or float16.
        weight: [S,N,K] of x's dtype, each stream's as nn.Linear stores it.
        bias: [S,N], any floating dtype, or None.
        gelu: apply GELU to the result.
        backend: "auto", "reference" or "cuda". The kernel is for Hopper GPUs and bfloat16, N and K multiples of 8; it
            sums in float32 and rounds once. "auto" takes torch's product.
    Returns:
        [S,...,N] of x's dtype.
    Raises:
        ValueError: shapes or devices disagree, or the backend can't be had.
        TypeError: a dtype is wrong.
    """
    _check_shapes(x, weight, bias)
    _check_dtypes(x, weight)
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if _choose("grouped_linear", backend, tensors, _refused(x, weight), BF16_BY_KERNEL) != "cuda":
        return reference_grouped_linear(x, weight, bias, gelu)
    out: Tensor = _launch(x, weight, bias, gelu)
    return out


def grouped_linear_fp8(
    x: Fp8Rows,
    weight: Fp8Rows,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    backend: backends.Backend = "auto",
) -> Tensor:
    """The same from rows of e4m3: `values_x @ values_weight.mT * scale_x * scale_weight + bias`, then GELU if wanted.

    There are no gradients.

    Args:
        x: values [S,...,K], at least three dimensions, and scale [S,...].
        weight: values [S,N,K] and scale [S,N], one for each output channel.
        bias: [S,N], any floating dtype, or None.
        gelu: apply GELU to the result.
        dtype: of the result.
        backend: "auto", "reference" or "cuda". The kernel is for Hopper GPUs, bfloat16 results, N a multiple of 8 and K
            of 16; it sums in float32 every 128 channels, between them the tensor core keeps about 14 bits. "auto" takes
            torch._scaled_mm where that can run, and else the reference, which multiplies in float32.
    Returns:
        [S,...,N].
    Raises:
        ValueError: shapes or devices disagree, a gradient is wanted, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Micikevicius et al., "FP8 Formats for Deep Learning", 2022; DeepSeek-V3, 2024, section 3.3.2 (sums).
    """
    _check_fp8(x, weight, dtype)
    _check_shapes(x.values, weight.values, bias)
    given = {"x.scale": x.scale, "weight.scale": weight.scale} | ({} if bias is None else {"bias": bias})
    refuse_gradients("grouped_linear_fp8", **given)
    tensors = [x.values, weight.values, *given.values()]
    refused = _refused_fp8(weight.values, dtype)
    chosen = _choose("grouped_linear_fp8", backend, tensors, refused, FP8_BY_KERNEL)
    if chosen == "cuda":
        out: Tensor = _launch_fp8(*x, *weight, bias, gelu)
        return out
    if chosen == "meta":
        return x.values.new_empty(_shape(x.values, weight.values), dtype=dtype)
    if backends.is_auto(backend) and takes_scaled_mm(x, weight, dtype):
        return scaled_mm_by_stream(x, weight, bias, gelu)
    return reference_grouped_linear_fp8(x, weight, bias, gelu, dtype)


def _choose(op: str, backend: backends.Backend, tensors: list[Tensor], refused: str, by_kernel: bool) -> str:
    """What `backend.resolve` gives, "cuda" only where our kernel is to run. `refused`: why it can't."""
    chosen = backends.resolve(op, backend, *tensors, dtypes=(E4M3, *DTYPES))
    if chosen != "cuda":
        return chosen
    if backends.is_auto(backend):
        return chosen if by_kernel and not refused else "reference"
    if refused:
        raise backends.BackendError(f"{op}: backend {chosen!r} cannot run: {refused}")
    return chosen


def _shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], weight.shape[1])


# Checks.


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_shape("weight", weight, ("S", "N", "K"))
    check_tensor("x", x, ("S", "...", "K"))
    if x.ndim < 3 or x.shape[-1] == 0:
        wanted = "[S,...,K] with at least three dimensions and one channel"
        raise ValueError(f"x: expected {wanted}, got {describe(x.shape)}")
    check_match("weight", weight, (x.shape[0], weight.shape[1], x.shape[-1]), "x", x)
    if bias is not None:
        check_shape("bias", bias, ("S", "N"))
        check_match("bias", bias, weight.shape[:2], "weight", weight)
        check_floating(bias=bias)


def _check_dtypes(x: Tensor, weight: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected {x.dtype} to match x, got {weight.dtype}")


def _check_fp8(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> None:
    for name, rows in (("x", x), ("weight", weight)):
        if not isinstance(rows, Fp8Rows):
            raise TypeError(f"{name}: expected Fp8Rows, as quantize_rows gives them, got {type(rows).__name__}")
        values, scale = rows
        if values.dtype != E4M3:
            raise TypeError(f"{name}.values: expected float8_e4m3fn, got {values.dtype}")
        check_match(f"{name}.scale", scale, values.shape[:-1], f"{name}.values", values)
        if scale.dtype != torch.float32:
            raise TypeError(f"{name}.scale: expected float32, got {scale.dtype}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")


def _refused(x: Tensor, weight: Tensor) -> str:
    """Why the bfloat16 kernel does not take these; the empty string where it does."""
    if x.dtype != torch.bfloat16:
        return f"the kernel takes bfloat16, got {x.dtype}"
    return _refused_sizes(weight, 8)


def _refused_fp8(weight: Tensor, dtype: torch.dtype) -> str:
    """Why the e4m3 kernel does not take these; the empty string where it does."""
    if dtype != torch.bfloat16:
        return f"the kernel gives bfloat16, asked for was {dtype}"
    return _refused_sizes(weight, 16)


def _refused_sizes(weight: Tensor, channels: int) -> str:
    if weight.shape[1] % 8 or weight.shape[2] % channels:
        return f"the kernel takes N a multiple of 8 and K of {channels}, got weight {describe(weight.shape)}"
    return ""


# The kernels.


def by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if _refused(x, weight):  # a saved program may bring what it was not traced with
        return _reference(x, weight, bias, gelu)
    out = x.new_empty(_shape(x, weight))
    if out.numel():
        x, weight, bias = backends.loadable(x.flatten(1, -2)), backends.loadable(weight), _readable_bias(bias)
        pointers = (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
        backends.call("grouped_linear", x.device, *pointers, *_numbers(x, weight, bias, gelu))
    return out


def fp8_by_kernel(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool
) -> Tensor:
    if _refused_fp8(weight, torch.bfloat16):
        return _reference_fp8(x, x_scale, weight, weight_scale, bias, gelu)
    out = x.new_empty(_shape(x, weight), dtype=torch.bfloat16)
    if out.numel():
        x, weight, bias = backends.loadable(x.flatten(1, -2)), backends.loadable(weight), _readable_bias(bias)
        x_scale, weight_scale = x_scale.contiguous(), weight_scale.contiguous()
        scaled = (x.data_ptr(), x_scale.data_ptr(), weight.data_ptr(), weight_scale.data_ptr())
        pointers = (*scaled, 0 if bias is None else bias.data_ptr(), out.data_ptr())
        backends.call("grouped_linear_fp8", x.device, *pointers, *_numbers(x, weight, bias, gelu))
    return out


def _numbers(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> tuple[int, ...]:
    """What follows the pointers: x is [S,M,K] by now."""
    bias_dtype = backends.DTYPE_CODES[torch.float32 if bias is None else bias.dtype]
    streams, rows, depth = x.shape
    return (bias_dtype, streams, rows, weight.shape[1], depth, *x.stride()[:2], *weight.stride()[:2], int(gelu))


def _readable_bias(bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    return (bias if bias.dtype in BIAS_DTYPES else bias.float()).contiguous()


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return reference_grouped_linear(x, weight, bias, gelu).contiguous()


def _reference_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool
) -> Tensor:
    return reference_grouped_linear_fp8(Fp8Rows(x, x_scale), Fp8Rows(weight, weight_scale), bias, gelu).contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(_shape(x, weight))


def _fake_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool
) -> Tensor:
    return x.new_empty(_shape(x, weight), dtype=torch.bfloat16)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gelu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    return (*grouped_linear_grad(grad, x, weight, bias, ctx.gelu), None)


_launch = backends.register(
    "grouped_linear",
    "(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
    kernel=by_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=DTYPES,
)
_launch_fp8 = backends.register(
    "grouped_linear_fp8",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, bool gelu) -> Tensor",
    kernel=fp8_by_kernel,
    reference=_reference_fp8,
    fake=_fake_fp8,
    dtypes=(E4M3, *DTYPES),
)
