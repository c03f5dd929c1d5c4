"""Procedural scenes as a torch data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from u4d.data.procedural.randomness import SPLIT_LENGTHS
from u4d.data.procedural.render import render_clips

if TYPE_CHECKING:
    from u4d.scene import Scene


class ProceduralScenes(torch.utils.data.Dataset["Scene"]):
    """Ray-traced scenes with exact depth and cameras: no download, the same on every machine.

    Args:
        split: "train" (1,000,000 scenes), "val" or "test" (1,000 each); disjoint whatever the seeds.
        frames: frames per clip.
        size: (H, W) in pixels.
        seed: another seed gives other scenes.
        compile: see `render_clips`.
    Raises:
        ValueError: unknown split, no frames, or an empty size.
    """

    def __init__(
        self,
        split: str = "train",
        frames: int = 18,
        size: tuple[int, int] = (96, 128),
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        if split not in SPLIT_LENGTHS:
            raise ValueError(f"split: expected one of {', '.join(SPLIT_LENGTHS)}, got {split!r}")
        if frames < 1 or min(size) < 1:
            raise ValueError(f"frames, size: expected at least one frame and pixel, got {frames} frames of {size}")
        self.split = split
        self.frames = frames
        self.size = size
        self.seed = seed
        self.compile = compile

    def __len__(self) -> int:
        return SPLIT_LENGTHS[self.split]

    def __getitem__(self, index: int) -> Scene:
        """Render scene `index`; negative indices count from the end.

        Raises:
            IndexError: outside the split (this also ends a plain `for` loop).
        """
        from u4d.scene import Scene

        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"index: expected -{len(self)}..{len(self) - 1} in split {self.split!r}, got {index}")
        clips = render_clips([number], self.split, self.frames, self.size, self.seed, compile=self.compile)
        rgb, depth, intrinsics, cam_to_world = clips.everything()
        return Scene(rgb=rgb[0], depth=depth[0], intrinsics=intrinsics[0], cam_to_world=cam_to_world[0])
