"""Bias and tanh GELU as rows of e4m3: checks, dispatch and tracing."""

from __future__ import annotations

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.fp8 import Fp8Rows, new_rows, refuse_gradients
from u4d_fast.frame_tables import resolve
from u4d_fast.ops.bias_gelu import call_biased, check_biased
from u4d_fast.ops.quantize_rows import MAX_WIDTH, check_rows
from u4d_fast.reference.bias_gelu_fp8 import bias_gelu_fp8 as reference_bias_gelu_fp8


def bias_gelu_fp8(x: Tensor, bias: Tensor, *, backend: backends.Backend = "auto") -> Fp8Rows:
    """`bias_gelu` in float32 and the `quantize_rows` of its result in one pass over memory.

    There are no gradients.

    Args:
        x: [S,...,D], at least three dimensions. D <= 16384 for the kernels.
        bias: [S,D], any floating dtype.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        values [S,...,D] float8_e4m3fn and scale [S,...] float32, both contiguous.
    Raises:
        ValueError: shapes disagree, a gradient is wanted, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.
    """
    check_rows("x", x)
    check_biased(x, bias)
    refuse_gradients("bias_gelu_fp8", x=x, bias=bias)
    if resolve("bias_gelu_fp8", backend, x, bias, most=MAX_WIDTH) == "reference":
        return reference_bias_gelu_fp8(x, bias)
    return Fp8Rows(*_launch(x, bias))


def _kernel(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows = new_rows(x)
    call_biased("bias_gelu_fp8", x, bias, *rows)
    return rows


def _reference(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = reference_bias_gelu_fp8(x, bias)
    return values.contiguous(), scale.contiguous()


def _fake(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return new_rows(x)


_launch = backends.register(
    "bias_gelu_fp8",
    "(Tensor x, Tensor bias) -> (Tensor values, Tensor scale)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    dtypes=backends.SINGLE_AND_HALF,
)
