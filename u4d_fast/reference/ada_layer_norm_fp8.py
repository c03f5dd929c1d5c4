"""Layer norm with a scale and a shift per latent frame, as rows of e4m3, in plain torch."""

from __future__ import annotations

from torch import Tensor

from u4d_fast.fp8 import Fp8Rows
from u4d_fast.reference.ada_layer_norm import ada_layer_norm, compute_dtype
from u4d_fast.reference.quantize_rows import quantize_rows


def ada_layer_norm_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Fp8Rows:
    """Specification of `u4d_fast.ada_layer_norm_fp8`: same arguments and results, any floating dtype."""
    return quantize_rows(ada_layer_norm(x.to(compute_dtype(x)), shift, scale, eps))
