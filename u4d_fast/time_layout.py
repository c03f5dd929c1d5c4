"""Which frames of a clip share a latent frame.

Latent frame 0 holds frame 0 alone, then come groups of four, and the last frame stands alone in the last
latent frame, so that the first and the last frame can be observed without knowing anything between them.
Source: the seed's "14 x 30 x 40 latent" for 50 frames, fixed by spec.md section 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

FRAMES_PER_GROUP = 4


def latent_frames(num_frames: int) -> int:
    """Number of latent frames F of a clip of N frames: 1 for N = 1, else 2 + ceil((N - 2) / 4).

    Raises:
        ValueError: num_frames is less than 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
    return 1 if num_frames == 1 else 2 + -(-(num_frames - 2) // FRAMES_PER_GROUP)


def frame_groups(num_frames: int) -> Tensor:
    """Frames in each latent frame.

    Returns:
        [F,4] int64 frame indices. The single frames of the first and the last latent frame are repeated four
        times; a group that the clip does not fill repeats its last frame.
    Raises:
        ValueError: num_frames is less than 1.
    """
    total = latent_frames(num_frames)
    groups = torch.zeros(total, FRAMES_PER_GROUP, dtype=torch.int64)
    if total > 2:
        inner = 1 + torch.arange((total - 2) * FRAMES_PER_GROUP).clamp_max(num_frames - 3)
        groups[1:-1] = inner.reshape(-1, FRAMES_PER_GROUP)
    if total > 1:
        groups[-1] = num_frames - 1
    return groups


def latent_frame_of(num_frames: int) -> Tensor:
    """Latent frame that holds each frame: [N] int64, the inverse of `frame_groups`."""
    frames = torch.arange(num_frames)
    owner = 1 + (frames - 1).div(FRAMES_PER_GROUP, rounding_mode="floor")
    owner[0] = 0
    owner[-1] = latent_frames(num_frames) - 1
    return owner
