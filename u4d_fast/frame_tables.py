"""Activations `[S,B,F*P,D]` beside tables `[S,B,F,D]` with one row per latent frame: their checks, and how both reach a
kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_match, check_shape, describe

MAX_WIDTH = 8192
"""Widest row of the kernels, as in csrc/kernels/gated_residual_norm/frame_rows.h."""

ROWS_PER_PART = 32
"""Rows of a frame that one task of a backward kernel adds up. Part of the result's bits, so a constant."""

DTYPES = (*backends.SINGLE_AND_HALF, torch.float64)


def check_frame_tables(x: Tensor, *, update: Tensor | None = None, **tables: Tensor) -> None:
    """Check activations, what is added to them, and their tables.

    Raises:
        ValueError: shapes disagree, or the tokens are no multiple of the tables' frames.
        TypeError: a dtype is wrong.
    """
    check_shape("x", x, ("S", "B", "T", "D"))
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.shape[3] == 0:
        raise ValueError(f"x: expected [S,B,T,D] with at least one channel, got {describe(x.shape)}")
    if update is not None:
        check_shape("update", update, ("S", "B", "T", "D"))
        check_match("update", update, x.shape, "x", x)
        if update.dtype != x.dtype:
            raise TypeError(f"update: expected {x.dtype} to match x, got {update.dtype}")
    streams, batch, tokens, width = x.shape
    frames = 0
    for name, table in tables.items():
        check_shape(name, table, ("S", "B", "F", "D"))
        frames = frames or table.shape[2]
        check_match(name, table, (streams, batch, frames, width), "x", x)
        check_floating(**{name: table})
    if frames == 0 or tokens % frames:
        wanted = f"[S,B,T,D] with T a multiple of the tables' {frames} frames"
        raise ValueError(f"x: expected {wanted}, got {describe(x.shape)}")


def resolve(op: str, backend: str, x: Tensor, *tensors: Tensor, most: int = MAX_WIDTH) -> str:
    """The implementation of a call; a row of more than `most` channels goes to the reference where `auto` may choose.

    Raises:
        BackendError: a backend was asked for by name and cannot run this.
    """
    chosen = backends.resolve(op, backend, x, *tensors, dtypes=backends.SINGLE_AND_HALF)
    if chosen == "reference" or x.shape[-1] <= most:
        return chosen
    if backends.is_auto(backend):
        return "reference"
    raise backends.BackendError(
        f"{op}: backend {chosen!r} cannot run: the kernels take at most {most} channels, got {x.shape[-1]}"
    )


def kernel_tables(*tables: Tensor) -> tuple[Tensor, ...]:
    """Tables as kernels read them: float32 with dense rows; views and expanded tensors of that kind are not copied."""
    return tuple(table.float() if table.stride(-1) == 1 else table.float().contiguous() for table in tables)


def table_strides(*tables: Tensor) -> list[int]:
    """Elements from one stream, clip and frame to the next, table by table."""
    return [stride for table in tables for stride in table.stride()[:3]]


def row_sizes(x: Tensor, table: Tensor) -> tuple[int, int, int, int, int, int]:
    """(dtype code, streams, batch, frames, tokens of a frame, width), as the kernels take them."""
    streams, batch, tokens, width = x.shape
    frames = table.shape[2]
    return backends.DTYPE_CODES[x.dtype], streams, batch, frames, tokens // frames, width


def partial_sums(table: Tensor, tokens: int, count: int) -> Tensor:
    """Room for the gradients of `count` tables of one shape, `[parts,count,S,B,F,D]` float32, for `added_up`.

    A frame's `tokens` are summed in parts of ROWS_PER_PART rows, in a fixed order: the same bits each time.
    """
    return table.new_empty(-(-tokens // ROWS_PER_PART), count, *table.shape, dtype=torch.float32)


def added_up(partials: Tensor) -> tuple[Tensor, ...]:
    """`[parts,count,S,B,F,D]` -> `count` gradients `[S,B,F,D]`, no two in the same memory."""
    return tuple(table.sum(0) for table in partials.unbind(1))
