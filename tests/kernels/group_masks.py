"""Random queries, keys and values, every kind of group mask, and attention as a loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BATCH, GROUPS, SIZE, HEADS, DIM = 2, 5, 4, 3, 6


def random_qkv(
    seed: int = 0, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (BATCH, GROUPS * SIZE, HEADS, DIM)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def attention_by_loop(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query at a time, over the keys that it may see; mask `[B,G,G]`."""
    size = q.shape[1] // mask.shape[-1]
    out = torch.zeros_like(q)
    for clip in range(q.shape[0]):
        for query in range(q.shape[1]):
            visible = mask[clip, query // size].repeat_interleave(size)
            if visible.any():
                scores = torch.einsum("lhd,hd->lh", k[clip, visible], q[clip, query]) / math.sqrt(q.shape[-1])
                out[clip, query] = torch.einsum("lh,lhd->hd", torch.softmax(scores, 0), v[clip, visible])
    return out


def random_mask(seed: int) -> Tensor:
    """About half of the pairs, with rows and columns that are empty; another one for each clip."""
    mask = torch.rand(BATCH, GROUPS, GROUPS, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0, 1], mask[1, :, 2] = False, False
    return mask


def existing(seed: int) -> Tensor:
    """Which groups exist as keys, `[B,G]`; the clips differ."""
    mask = torch.rand(BATCH, GROUPS, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, 0], mask[:, 1], mask[0, 4], mask[1, 4] = True, False, True, False
    return mask


def own_stream(streams: int, frames: int, batch: int = 1) -> Tensor:
    """Each stream sees itself alone: `[B,4F,4F]`."""
    return torch.block_diag(*[torch.ones(frames, frames)] * streams).bool().expand(batch, -1, -1)


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "existing": lambda: existing(1),
    "existing, equal": lambda: existing(2)[:1].expand(BATCH, -1),
    "nothing exists in one clip": lambda: torch.tensor([[True, False, True, True, False], [False] * GROUPS]),
    "nothing exists": lambda: torch.zeros(BATCH, GROUPS, dtype=torch.bool),
    "everything exists": lambda: torch.ones(BATCH, GROUPS, dtype=torch.bool),
    "pairs 0": lambda: random_mask(0),
    "pairs 1": lambda: random_mask(1),
    "pairs, equal": lambda: random_mask(2)[:1].expand(BATCH, -1, -1),
    "causal": lambda: torch.ones(BATCH, GROUPS, GROUPS, dtype=torch.bool).tril(),
    "strided": lambda: random_mask(3).mT,
}


def as_pairs(mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(BATCH, GROUPS, GROUPS, dtype=torch.bool)
    return mask if mask.ndim == 3 else mask[:, None].expand(-1, mask.shape[1], -1)
