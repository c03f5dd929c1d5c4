"""Bias and tanh GELU, as rows of e4m3, in plain torch."""

from __future__ import annotations

from torch import Tensor

from u4d_fast.fp8 import Fp8Rows
from u4d_fast.reference.ada_layer_norm import compute_dtype
from u4d_fast.reference.bias_gelu import bias_gelu
from u4d_fast.reference.quantize_rows import quantize_rows


def bias_gelu_fp8(x: Tensor, bias: Tensor) -> Fp8Rows:
    """Specification of `u4d_fast.bias_gelu_fp8`: same arguments and results, any floating dtype."""
    return quantize_rows(bias_gelu(x.to(compute_dtype(x)), bias))
