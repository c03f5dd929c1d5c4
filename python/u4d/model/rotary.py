"""Rotary positions of the tokens of a stream; all streams share them."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(frames: int, rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 3-D rotary embedding, with Wan's split of the head dimension.

    Returns:
        two float32 `[frames*rows*columns, head_dim/2]` tables, tokens in (frame, row, column) order.
    """
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
