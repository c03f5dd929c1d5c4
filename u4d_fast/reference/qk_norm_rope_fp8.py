"""RMS norm of queries or keys and 3-D rotary positions, as rows of e4m3 in attention's layout; in plain torch."""

from __future__ import annotations

from torch import Tensor

from u4d_fast.fp8 import Fp8Rows
from u4d_fast.reference.ada_layer_norm import compute_dtype
from u4d_fast.reference.qk_norm_rope import qk_norm_rope
from u4d_fast.reference.quantize_rows import quantize_rows


def qk_norm_rope_fp8(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float = 1e-6) -> Fp8Rows:
    """Specification of `u4d_fast.qk_norm_rope_fp8`: same arguments and results, any floating dtype."""
    return quantize_rows(qk_norm_rope(x.to(compute_dtype(x)), weight, cos, sin, heads, eps))
