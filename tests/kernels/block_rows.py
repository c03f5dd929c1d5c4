"""Activations and tables for the tests of a block's element-wise ops, and the rule their kernels are held to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ORDERS = ["forward", "reverse"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["view of six", "expanded clips", "expanded frames", "columns apart"]
STEP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Shape(NamedTuple):
    """Activations `[streams,batch,frames*patches,width]`, tables `[streams,batch,frames,width]`."""

    streams: int
    batch: int
    frames: int
    patches: int
    width: int


# Widths: one column, odd ones, less and more than a warp's chunk, wan-1.3b, Wan 14B, the widest.
SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(2, 1, 3, 2, 7),
    Shape(4, 2, 3, 5, 48),
    Shape(1, 3, 2, 1, 250),
    Shape(3, 1, 1, 9, 264),
    Shape(2, 1, 2, 3, 1000),
    Shape(1, 2, 2, 2, 1536),
    Shape(1, 1, 2, 3, 5120),
    Shape(1, 1, 1, 2, 8190),
    Shape(1, 1, 1, 3, 8192),
]
EMPTY = [Shape(2, 0, 3, 2, 16), Shape(2, 2, 3, 0, 16), Shape(0, 1, 1, 1, 8)]
ON_THE_SHIM = [Shape(1, 1, 1, 1, 1), Shape(2, 2, 3, 3, 64), Shape(2, 1, 2, 2, 77), *SHAPES[-5:], *EMPTY]
# Backward passes add up rows in parts: less than one part, one and a bit, two and a bit.
IN_PARTS = [Shape(2, 2, 2, 33, 16), Shape(1, 1, 1, 65, 40), Shape(1, 1, 2, 2, 2056)]
WIDE = [Shape(1, 1, 2, 3, 8190), Shape(1, 1, 1, 3, 8192)]
SMALL = Shape(2, 1, 2, 3, 8)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def activations(shape: Shape, dtype: torch.dtype, count: int, seed: int = 0) -> list[Tensor]:
    """Random rows with a mean well away from 0, which a careless variance loses digits to."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.streams, shape.batch, shape.frames * shape.patches, shape.width)
    return [(torch.randn(size, generator=generator) + 3.0).to(dtype) for _ in range(count)]


def tables(shape: Shape, count: int, seed: int = 1) -> list[Tensor]:
    """Random float32 tables."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.streams, shape.batch, shape.frames, shape.width)
    return [0.5 * torch.randn(size, generator=generator) for _ in range(count)]


def lay_out(table: Tensor, layout: str) -> Tensor:
    """A table in another layout of memory; an expanded one takes its first clip's or frame's row for all."""
    if layout == "view of six":
        six = table.new_full((*table.shape[:3], 6, table.shape[3]), torch.nan)
        six[..., 2, :] = table
        return six[..., 2, :]
    if layout == "expanded clips":
        return table[:, :1].clone().expand(table.shape)
    if layout == "expanded frames":
        return table[:, :, :1].clone().expand(table.shape)
    return table.mT.contiguous().mT


def assert_no_worse(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The rule of all kernels: at most twice the error of plain torch in the same precision, and a floor.

    It holds for the largest error and for the norm of all, both against float64. Row by row, where chance has more to
    say, a few steps of rounding are allowed beside it: enough to see a row that is wrong.
    """
    assert found.dtype == plain.dtype and found.shape == plain.shape == exact.shape
    if not exact.numel():
        return
    step = STEP[found.dtype]
    ours, theirs = (found.double().cpu() - exact).abs(), (plain.double().cpu() - exact).abs()
    assert ours.max() <= 2 * theirs.max() + step * exact.abs().max(), (ours.max(), theirs.max())
    assert ours.norm() <= 2 * theirs.norm() + step * exact.norm(), (ours.norm(), theirs.norm())
    assert (ours.amax(-1) <= 2 * theirs.amax(-1) + 8 * step * (exact.abs().amax(-1) + 0.1)).all()


@contextlib.contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """torch fills what it allocates with NaN, so an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
