"""Rows as e4m3 with a float32 scale each: checks, dispatch and tracing."""

from __future__ import annotations

import math

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_tensor, describe
from u4d_fast.fp8 import Fp8Rows, new_rows, refuse_gradients
from u4d_fast.frame_tables import resolve
from u4d_fast.reference.quantize_rows import quantize_rows as reference_quantize_rows

MAX_WIDTH = 16384
"""Widest row of the kernels, as in csrc/kernels/quantize_rows/quantize_rows.h."""


def quantize_rows(x: Tensor, *, backend: backends.Backend = "auto") -> Fp8Rows:
    """Rows as e4m3, each with a scale that puts its largest magnitude on the largest number of e4m3.

    The arithmetic is float32. With scale = amax / 448 (never below the smallest normal number; 1 for a row of zeros),
    the values are x / scale rounded to nearest, ties to even. A row with NaN or infinity in it has the scale NaN, and
    nothing but NaN in its values.

    There are no gradients.

    Args:
        x: [...,D], any floating dtype but float8. D <= 16384 for the kernels.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        values [...,D] float8_e4m3fn and scale [...] float32, both contiguous.
    Raises:
        ValueError: x has no columns, a gradient is wanted, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Micikevicius et al., "FP8 Formats for Deep Learning", 2022, sections 3 and 4.
    """
    check_rows("x", x)
    refuse_gradients("quantize_rows", x=x)
    if resolve("quantize_rows", backend, x, most=MAX_WIDTH) == "reference":
        return reference_quantize_rows(x)
    return Fp8Rows(*_launch(x))


def check_rows(name: str, x: Tensor) -> None:
    """Check what is to be quantised.

    Raises:
        ValueError: it has no columns.
        TypeError: it is no tensor, float8 already, or not floating.
    """
    check_tensor(name, x, ("...", "D"))
    check_floating(**{name: x})
    if x.dtype.itemsize == 1:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected [...,D] with at least one column, got {describe(x.shape)}")


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows = new_rows(x)
    pointers = [tensor.data_ptr() for tensor in (x, *rows)]
    sizes = backends.DTYPE_CODES[x.dtype], math.prod(x.shape[:-1]), x.shape[-1]
    backends.call("quantize_rows", x.device, *pointers, *sizes)
    return rows


def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = reference_quantize_rows(x)
    return values.contiguous(), scale.contiguous()


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return new_rows(x)


_launch = backends.register(
    "quantize_rows",
    "(Tensor x) -> (Tensor values, Tensor scale)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    dtypes=backends.SINGLE_AND_HALF,
)
