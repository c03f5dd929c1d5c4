"""Frames as a reader found them, before they become a scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from u4d.errors import UserError

DEFAULT_FPS = 24.0


@dataclass(frozen=True, eq=False)
class Footage:
    """Frames that were kept of a clip, and what is known about when and where they come from.

    Attributes:
        rgb: [N,3,H,W] float32 in [0,1].
        fps: of the kept frames (lower than the clip's when frames were left out).
        total: number of frames of the whole clip.
        kept: for each of the N frames its number in the whole clip.
        stamps: for each of the N frames when it was taken; seconds since the first frame for a video, the number that
            is its file's name for images; None where neither is known.
        names: for each of the N frames its file's name without folder and suffix; None for a video.
        stored_size: (H, W) of the pictures before they were resized on reading; None where they were not.
    """

    rgb: Tensor
    fps: float
    total: int
    kept: tuple[int, ...]
    stamps: tuple[float, ...] | None = None
    names: tuple[str, ...] | None = None
    stored_size: tuple[int, int] | None = None


def even_indices(total: int, max_frames: int | None) -> list[int]:
    """At most `max_frames` of `total` frames, evenly spread, the first and (from two on) the last among them.

    Raises:
        UserError: max_frames is less than 1.
    """
    if max_frames is not None and max_frames < 1:
        raise UserError(f"max_frames: expected at least 1, got {max_frames}")
    if max_frames is None or max_frames >= total:
        return list(range(total))
    if max_frames == 1:
        return [0]
    return [(2 * i * (total - 1) + max_frames - 1) // (2 * (max_frames - 1)) for i in range(max_frames)]


def kept_fps(fps: float, total: int, kept: int) -> float:
    """Frame rate at which the kept frames last as long as the whole clip."""
    return fps * (kept - 1) / (total - 1) if kept > 1 and total > 1 else fps


def fit_picture(picture: np.ndarray, image_size: tuple[int, int] | None) -> np.ndarray:
    """A picture [H,W,3] uint8 as it is held: as it is, or resized in float32, the way `Scene.resized` does it."""
    if image_size is None or picture.shape[:2] == image_size:
        return picture
    channels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(channels, image_size, mode="bilinear", antialias=True).clamp(0, 255)
    return resized[0].permute(1, 2, 0).numpy()


def stack_frames(frames: list[np.ndarray]) -> Tensor:
    """[H,W,3] pictures of one size, 0 to 255 -> [N,3,H,W] float32 in [0,1]. Empties the list, to hold little twice."""
    height, width, _ = frames[0].shape
    rgb = torch.empty(len(frames), 3, height, width)
    for i in range(len(frames) - 1, -1, -1):
        rgb[i] = torch.from_numpy(np.ascontiguousarray(frames.pop())).permute(2, 0, 1)
    return rgb.div_(255)


def rgb_bytes(frame: Tensor) -> np.ndarray:
    """One picture [3,H,W] in [0,1] -> [H,W,3] uint8, rounded to the nearest."""
    return frame.detach().mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy()
