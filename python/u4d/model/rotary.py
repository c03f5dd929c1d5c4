"""Rotary positions of the tokens of a stream; all streams share them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def rotary_table(frames: int, rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 3-D rotary embedding, with Wan's split of the head dimension; made once and kept.

    Returns:
        two float32 `[frames*rows*columns, head_dim/2]` tables, tokens in (frame, row, column) order.
    """
    # What is kept must neither come from a trace or a recorded graph nor be a constant in one.
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if traced or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return make_rotary_table(frames, rows, columns, head_dim, device)
    return kept_rotary_table(frames, rows, columns, head_dim, device)


@lru_cache(maxsize=8)
def kept_rotary_table(
    frames: int, rows: int, columns: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`make_rotary_table`, for training and inference alike."""
    with torch.inference_mode(False):
        return make_rotary_table(frames, rows, columns, head_dim, device)


def make_rotary_table(
    frames: int, rows: int, columns: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The tables of `rotary_table`."""
    spatial = 2 * (head_dim // 6)
    angles = []
    for size, width, view in (
        (frames, head_dim - 2 * spatial, (frames, 1, 1, -1)),
        (rows, spatial, (1, rows, 1, -1)),
        (columns, spatial, (1, 1, columns, -1)),
    ):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        position = torch.arange(size, dtype=torch.float64, device=device)
        angle = torch.outer(position, 10000.0**-exponent)
        angles.append(angle.view(*view).expand(frames, rows, columns, -1))
    joint = torch.cat(angles, dim=-1).flatten(0, 2)
    return joint.cos().float(), joint.sin().float()
