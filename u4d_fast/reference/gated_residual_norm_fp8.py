"""A gated residual update, and the adaptive layer norm of its result as rows of e4m3, in plain torch."""

from __future__ import annotations

from torch import Tensor

from u4d_fast.fp8 import Fp8Rows
from u4d_fast.reference.ada_layer_norm_fp8 import ada_layer_norm_fp8
from u4d_fast.reference.gated_residual import gated_residual


def gated_residual_norm_fp8(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Fp8Rows]:
    """Specification of `u4d_fast.gated_residual_norm_fp8`: same arguments and results, any floating dtype."""
    x_new = gated_residual(x, update, gate)
    return x_new, ada_layer_norm_fp8(x_new, shift, scale, eps)
