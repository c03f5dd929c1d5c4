"""Softmax attention over groups from 8-bit numbers, in plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from u4d_fast.reference.multi_stream_attention import Part, join, plan, take
from u4d_fast.reference.quantize_rows import LARGEST, SMALLEST_SCALE, quantize_rows

WEIGHT_SCALE = 256.0
"""The largest weight of a query before its weights are rounded: a power of two that e4m3 holds, so that weights down to
2^-17 of the largest are not rounded to zero. It cancels between sum and result."""

QUERY_CHUNK = 512
"""Queries whose weights are stored at a time."""


class Quantized(NamedTuple):
    """What attention is computed from; values are e4m3 numbers as float32, x ~ values * scale.

    Attributes:
        q, k, v: [B,T,heads,d].
        q_scale: [B,T,heads], one for each row.
        k_scale, v_scale: [B,heads].
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor


def multi_stream_attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None = None
) -> Tensor:
    """Specification of `u4d_fast.multi_stream_attention_fp8`: same arguments and results.

    Weights are rounded relative to the largest of all that a query sees. The kernel goes through the keys once: it
    rounds relative to the largest so far, and shrinks what it has summed when a larger one comes. So single weights may
    be rounded differently, and small ones of early keys more finely; the error is of the same size.
    """
    if not q.numel():
        return torch.zeros_like(q)
    given = quantize(q, k, v, seen_tokens(group_mask, group_size))
    if group_mask is None:
        return attend(given).to(q.dtype)
    clips = []
    for batch in plan(group_mask, group_size):
        here = Quantized(*(take(x, batch.clips, 0) for x in given))
        clips.append((batch.clips, join([(part.queries, attend_part(here, part)) for part in batch.parts], 1)))
    return join(clips, 0).to(q.dtype)


def seen_tokens(group_mask: Tensor | None, group_size: int) -> Tensor | None:
    """Keys that anybody sees, `[B,T]`; None where there is no mask."""
    if group_mask is None:
        return None
    groups = group_mask if group_mask.ndim == 2 else group_mask.any(1)
    return groups.repeat_interleave(group_size, 1)


def quantize(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Quantized:
    """Queries with a scale for each row, keys and values with one for each head of a clip."""
    queries = quantize_rows(q)
    keys, key_scale = quantize_heads(k, seen)
    values, value_scale = quantize_heads(v, seen)
    return Quantized(queries.values.float(), queries.scale, keys, key_scale, values, value_scale)


def quantize_heads(x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round `[B,T,heads,d]` to e4m3 with one scale for each head.

    The scale is the largest finite magnitude / 448, so that a NaN reaches those only who see its token. Infinity
    becomes NaN, which e4m3 has. Tokens that nobody sees (`seen` `[B,T]`) do not count, and are zeros.

    Returns:
        The e4m3 values as float32 `[B,T,heads,d]`, and the scales `[B,heads]`.
    """
    wide = x.float()
    if seen is not None:
        wide = wide.masked_fill(~seen.to(x.device)[..., None, None], 0.0)
    wide = wide.masked_fill(wide.isinf(), torch.nan)
    largest = wide.nan_to_num(0.0).abs().amax((1, 3))
    scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE).masked_fill(largest == 0, 1.0)
    values = (wide * (1 / scale)[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.float(), scale


def attend_part(given: Quantized, part: Part) -> Tensor:
    """The queries of a part over its keys, float32; zeros where it has no keys."""
    queries, query_scale = (take(x, part.queries, 1) for x in (given.q, given.q_scale))
    if not part.keys:
        return torch.zeros_like(queries)
    keys, values = (take(x, part.keys, 1) for x in (given.k, given.v))
    return attend(Quantized(queries, query_scale, keys, given.k_scale, values, given.v_scale))


def attend(given: Quantized) -> Tensor:
    """Every query sees every key: float32 `[B,T,heads,d]`."""
    keys, values = given.k.permute(0, 2, 3, 1), given.v.transpose(1, 2)
    chunks = []
    for queries, scale in zip(given.q.split(QUERY_CHUNK, 1), given.q_scale.split(QUERY_CHUNK, 1), strict=True):
        factor = (scale * given.k_scale[:, None] / math.sqrt(given.q.shape[-1])).transpose(1, 2)
        scores = queries.transpose(1, 2) @ keys * factor[..., None]
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * WEIGHT_SCALE
        # The sum is that of the weights before they are rounded: rounding errors of either sign average out.
        share = given.v_scale[:, :, None, None] / weights.sum(-1, keepdim=True)
        chunks.append((weights.to(torch.float8_e4m3fn).float() @ values * share).transpose(1, 2))
    return torch.cat(chunks, 1)
