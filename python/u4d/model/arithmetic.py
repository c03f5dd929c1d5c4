"""What the matrix products of a block are computed from: its weights' own type, or fp8 (e4m3 with a scale per row).

In fp8 the steps before a linear layer hand on fp8 rows in the place of a tensor, and the layer multiplies those with
its weight in fp8; what lies between (norms, residuals, gates, softmax) stays as it was. Embeddings, keys and values of
the text and the last projection stay exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import u4d_fast
from u4d.presets import PRECISIONS, Precision
from u4d_fast import Fp8Rows

Rows = Tensor | Fp8Rows


@dataclass(frozen=True)
class Arithmetic:
    """The steps of a block that depend on the precision of its matrix products.

    Attributes:
        rows: what a linear layer takes, of a tensor `[...,D]`.
        norm: `ada_layer_norm` that gives it.
        residual_norm: `gated_residual_norm` that gives it.
        attention: `multi_stream_attention`.
    """

    rows: Callable[[Tensor], Rows]
    norm: Callable[[Tensor, Tensor, Tensor, float], Rows]
    residual_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Rows]]
    attention: Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None) -> Tensor:
    """`multi_stream_attention`, and where all see all the library that was measured to be the fastest."""
    if group_mask is None:
        return u4d_fast.dense_attention(q, k, v)
    return u4d_fast.multi_stream_attention(q, k, v, group_size, group_mask)


def as_it_is(x: Tensor) -> Tensor:
    """x."""
    return x


def arithmetic_of(precision: Precision) -> Arithmetic:
    """The steps of that precision: "exact", "fp8" (linear layers and self-attention) or "fp8-linear".

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "exact":
        return Arithmetic(as_it_is, u4d_fast.ada_layer_norm, u4d_fast.gated_residual_norm, exact_attention)
    attention = u4d_fast.multi_stream_attention_fp8 if precision == "fp8" else exact_attention
    return Arithmetic(u4d_fast.quantize_rows, u4d_fast.ada_layer_norm_fp8, u4d_fast.gated_residual_norm_fp8, attention)
