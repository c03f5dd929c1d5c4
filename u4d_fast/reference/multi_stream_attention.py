"""Softmax attention in which whole groups of tokens see or do not see each other, in plain torch.

What a query may not see is left out of its attention instead of being masked: a mask between the 16,800 tokens of a
clip would be 282 MB, and masked keys cost as much as visible ones. spec.md section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Run: TypeAlias = tuple[int, int]
"""Neighbours along a dimension: the first, and the one after the last."""


@dataclass(frozen=True)
class Part:
    """One dense attention: each of these query tokens sees each of these key tokens, and nothing else."""

    queries: tuple[Run, ...]
    keys: tuple[Run, ...]


@dataclass(frozen=True)
class Batch:
    """Clips whose masks are equal, and the attentions they need; the queries of all parts are the whole clip."""

    clips: tuple[Run, ...]
    parts: tuple[Part, ...]


def multi_stream_attention(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None = None
) -> Tensor:
    """Attention over groups: the specification of `u4d_fast.multi_stream_attention`, which documents it.

    Each part of the plan that the mask is turned into is one call of torch's attention. Without a mask, or with one
    `[B,G]` mask for all clips, there is a single call.
    """
    return attend(q, k, v) if group_mask is None else attend_as_planned(q, k, v, plan(group_mask, group_size))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees every key: `[B,T,heads,d]`, `[B,L,heads,d]` twice -> `[B,T,heads,d]`."""
    # Memory-saving implementations want neighbouring channels; torch would fall back to one that stores T x L weights.
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    if not q.numel():  # torch 2.11's fused kernel divides by zero there, which ends the process
        return (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attend_as_planned(q: Tensor, k: Tensor, v: Tensor, batches: Sequence[Batch]) -> Tensor:
    """The attentions of a plan, each written to its place: `[B,T,heads,d]` -> `[B,T,heads,d]`."""
    if not q.numel():
        return attend(q, k, v)
    pieces = []
    for batch in batches:
        queries, keys, values = (take(x, batch.clips, 0) for x in (q, k, v))
        attended = [(part.queries, attend_part(queries, keys, values, part)) for part in batch.parts]
        pieces.append((batch.clips, join(attended, 1)))
    return join(pieces, 0)


def log_sum_exp(q: Tensor, k: Tensor, group_size: int, group_mask: Tensor | None = None) -> Tensor:
    """log(sum(exp(scores))) over what each query sees: `[B,heads,T]`, float32, -inf where it sees nothing.

    The specification of the kernels' second result. Unlike an attention it stores scores: those of a part and a head.
    """
    batch, tokens, heads, dim = q.shape
    if not q.numel():
        return q.new_full((batch, heads, tokens), -torch.inf, dtype=torch.float32)
    if group_mask is None:
        group_mask, group_size = torch.ones(batch, 1, dtype=torch.bool), tokens
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    pieces = []
    for clips in plan(group_mask, group_size):
        queries, keys = take(q, clips.clips, 0), take(k, clips.clips, 0)
        sums = []
        for part in clips.parts:
            pairs = zip(take(queries, part.queries, 1).unbind(2), take(keys, part.keys, 1).unbind(2), strict=True)
            sums.append((part.queries, torch.stack([(a @ b.mT / dim**0.5).logsumexp(-1) for a, b in pairs], 2)))
        pieces.append((clips.clips, join(sums, 1)))
    return join(pieces, 0).float().transpose(1, 2).contiguous()


def attend_part(q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
    """The queries of a part over its keys; zeros where it has no keys."""
    q, k, v = take(q, part.queries, 1), take(k, part.keys, 1), take(v, part.keys, 1)
    if part.keys:
        return attend(q, k, v)
    # A sum over nothing. Torch's attention would add 0 times the sum of q, which is NaN where q holds one.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT @ v).transpose(1, 2)


def plan(group_mask: Tensor, group_size: int) -> tuple[Batch, ...]:
    """Read a mask, `[B,G]` or `[B,G,G]`, on the host. The result is small: indices of tokens, and no tensors."""
    clips_of: dict[bytes, list[int]] = {}
    for clip, mask in enumerate(group_mask.cpu().numpy()):
        clips_of.setdefault(mask.tobytes(), []).append(clip)
    groups = group_mask.shape[-1]
    return tuple(Batch(neighbours(clips), parts(rows, groups, group_size)) for rows, clips in clips_of.items())


@lru_cache(maxsize=256)  # all layers, and all steps of a clip, come with the same mask
def parts(rows: bytes, groups: int, group_size: int) -> tuple[Part, ...]:
    """The dense attentions that one clip's mask asks for: query groups that see the same keys go together.

    Args:
        rows: the mask, one byte for each (query group, key group), or for each key group where all queries are alike.
        groups: G.
        group_size: tokens in a group.
    """
    queries: dict[bytes, list[int]] = {}
    for query in range(groups):
        row = rows[query * groups : (query + 1) * groups] if len(rows) > groups else rows
        queries.setdefault(row, []).append(query)
    return tuple(
        Part(neighbours(members, group_size), neighbours([key for key, seen in enumerate(row) if seen], group_size))
        for row, members in queries.items()
    )


def neighbours(indices: Sequence[int], size: int = 1) -> tuple[Run, ...]:
    """Ascending indices of blocks of `size` elements as runs of elements: [0, 1, 4] -> ((0, 2), (4, 5)) for size 1."""
    runs: list[Run] = []
    for index in indices:
        start = runs.pop()[0] if runs and runs[-1][1] == index * size else index * size
        runs.append((start, (index + 1) * size))
    return tuple(runs)


def take(x: Tensor, runs: tuple[Run, ...], dim: int) -> Tensor:
    """These runs of x along a dimension: a view of none or one, a copy of several."""
    pieces = [x.narrow(dim, start, end - start) for start, end in runs or ((0, 0),)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def join(pieces: Iterable[tuple[tuple[Run, ...], Tensor]], dim: int) -> Tensor:
    """Put what was taken back into its place; the runs of all pieces together cover the dimension."""
    placed: dict[int, Tensor] = {}
    for runs, piece in pieces:
        split = piece.split([end - start for start, end in runs], dim)
        placed.update((start, part) for (start, _), part in zip(runs, split, strict=True))
    ordered = [placed[start] for start in sorted(placed)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim)
