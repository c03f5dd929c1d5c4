"""A clip with everything that is known about it: pictures, depth, cameras.

One type goes in and comes out of every task; what is not known is `None`. Conventions: spec, section 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.geometry.cameras import check_intrinsics, check_rigid, resize_intrinsics
from u4d.geometry.depth import valid_depth

RGB_TOLERANCE = 1e-3  # resampling filters overshoot by rounding; more than this is another value range


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip of N frames of H x W pixels; whatever is not known is `None`. Tensors are float32, on the CPU when loaded.

    Attributes:
        rgb: [N,3,H,W] in [0,1].
        depth: [N,H,W], metres (or units) along the optical axis. Invalid pixels (0, negative, NaN, infinite) are stored
            as 0; a frame may be wholly invalid (see `frames_without_depth`), a clip may not.
        intrinsics: [N,3,3], pixels of H x W; the first pixel's centre is (0.5, 0.5).
        cam_to_world: [N,4,4], OpenCV axes (x right, y down, z forward), same unit as depth.
        caption: a description in words.
        fps: frames per second.
        scale: the clip's scale, metres per model unit (spec, section 1), where it is known.
        report: whatever was measured on the way; `report["source"]` says how a loaded clip was read.
    Raises:
        UserError: shapes disagree, rgb outside [0,1], a pose that is not rigid or an intrinsic matrix that is no
            pinhole camera's (the frame is named), depth without a single valid pixel, or nothing given at all.
    """

    rgb: Tensor | None = None
    depth: Tensor | None = None
    intrinsics: Tensor | None = None
    cam_to_world: Tensor | None = None
    caption: str = ""
    fps: float = 24.0
    scale: float | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check everything once, and settle dtype and invalid depth, so that no later step has to."""
        shapes = {"rgb": ("N", 3, "H", "W"), "depth": ("N", "H", "W"), "intrinsics": ("N", 3, 3)}
        shapes["cam_to_world"] = ("N", 4, 4)
        sizes: dict[str, tuple[int, str]] = {}
        for name, wanted in shapes.items():
            value = getattr(self, name)
            if value is not None:
                _check_shape(name, value, wanted, sizes)
                object.__setattr__(self, name, value.to(torch.float32))
        if not sizes:
            raise UserError("Scene: expected at least one of rgb, depth, intrinsics, cam_to_world, got none")
        if self.rgb is not None:
            object.__setattr__(self, "rgb", _checked_rgb(self.rgb))
        if self.depth is not None:
            object.__setattr__(self, "depth", _checked_depth(self.depth))
        if self.intrinsics is not None:
            check_intrinsics(self.intrinsics, "intrinsics")
        if self.cam_to_world is not None:
            check_rigid(self.cam_to_world, "cam_to_world")
        for name, number in (("fps", self.fps), ("scale", self.scale)):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise UserError(f"{name}: expected a positive number, got {number}")

    @property
    def num_frames(self) -> int:
        """N."""
        return int(
            next(t.shape[0] for t in (self.rgb, self.depth, self.intrinsics, self.cam_to_world) if t is not None)
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels.

        Raises:
            UserError: the scene holds cameras only, so no size is known.
        """
        picture = self.rgb if self.rgb is not None else self.depth
        if picture is None:
            raise UserError("image_size: expected a scene with rgb or depth, got cameras alone")
        return int(picture.shape[-2]), int(picture.shape[-1])

    @property
    def frames_without_depth(self) -> tuple[int, ...]:
        """Frames in which no pixel has a depth; all of them where depth is not known at all."""
        if self.depth is None:
            return tuple(range(self.num_frames))
        return tuple(int(i) for i in (self.depth <= 0).flatten(1).all(1).nonzero().flatten())

    def frames(self, indices: Sequence[int] | slice | Tensor) -> Scene:
        """The sub-clip of these frames, in this order; negative indices count from the end.

        `fps` follows when the frames are evenly spaced. Depth becomes `None` when none of the frames has any.

        Raises:
            UserError: no index, or one outside the clip.
        """
        chosen = _frame_list(indices, self.num_frames)
        pick = torch.tensor(chosen)
        depth = None if self.depth is None else self.depth[pick.to(self.depth.device)]
        if depth is not None and not bool((depth > 0).any()):
            depth = None
        steps = {b - a for a, b in pairwise(chosen)}
        step = steps.pop() if len(steps) == 1 else 1
        return replace(
            self,
            rgb=None if self.rgb is None else self.rgb[pick.to(self.rgb.device)],
            depth=depth,
            intrinsics=None if self.intrinsics is None else self.intrinsics[pick.to(self.intrinsics.device)],
            cam_to_world=None if self.cam_to_world is None else self.cam_to_world[pick.to(self.cam_to_world.device)],
            fps=self.fps / step if step > 0 else self.fps,
        )

    def resized(self, size: tuple[int, int]) -> Scene:
        """The scene at another image size (H, W); the aspect ratio may change, since the intrinsics follow.

        Pictures are filtered (bilinear, antialiased). Depth takes the nearest pixel, so that invalid 0 stays invalid
        and no depth appears between a near and a far surface.

        Raises:
            UserError: a size that is not two positive whole numbers, or a scene with cameras alone.
        """
        if len(size) != 2 or any(int(side) != side or side < 1 for side in size):
            raise UserError(f"size: expected (height, width) in whole pixels, got {size}")
        wanted = (int(size[0]), int(size[1]))
        if wanted == self.image_size:
            return self
        rgb, depth, intrinsics = self.rgb, self.depth, self.intrinsics
        if rgb is not None:
            rgb = torch.nn.functional.interpolate(rgb, wanted, mode="bilinear", antialias=True).clamp(0, 1)
        if depth is not None:
            depth = torch.nn.functional.interpolate(depth[:, None], wanted, mode="nearest-exact")[:, 0]
        if intrinsics is not None:
            intrinsics = resize_intrinsics(intrinsics, self.image_size, wanted)
        return replace(self, rgb=rgb, depth=depth, intrinsics=intrinsics)

    @staticmethod
    def load(
        path: str | Path,
        *,
        cameras: str | Path | None = None,
        max_frames: int | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> Scene:
        """Read a clip: a video, an image, a folder of images, a saved scene, or a nerfstudio `transforms.json`.

        Args:
            path: file or folder. Rotation metadata of videos and photographs is honoured.
            cameras: a camera path to attach: nerfstudio json, RealEstate10K text, or TUM trajectory (no intrinsics).
            max_frames: read at most so many frames, evenly spaced, first and last always among them. Only these are
                held in memory.
            image_size: (H, W) to bring the clip to, as `resized` does. Videos and images are resized one by one while
                they are read, so that a long clip need not be held at its full size.
        Raises:
            UserError: nothing there, damaged or unsuitable files, or a camera path that does not fit; the message
                names the file and, where it applies, the frame.
        """
        from u4d.data.open_scene import open_scene

        return open_scene(Path(path), None if cameras is None else Path(cameras), max_frames, image_size)

    def save(
        self,
        folder: str | Path,
        *,
        lossless: bool = False,
        overwrite: bool = False,
        source: Scene | None = None,
        truth: Scene | None = None,
        errors: dict[str, Any] | None = None,
    ) -> Path:
        """Write the saved scene folder of spec section 6; `Scene.load(folder)` gives the scene back.

        Everything is written beside `folder` first and put in place at the end: a failed or interrupted save leaves an
        older result as it was.

        Args:
            folder: where to. An empty folder is filled; missing parents are made.
            lossless: PNG frames instead of an mp4.
            overwrite: replace an older saved scene (a folder that holds `scene.json`; never anything else).
            source: what was given as input, for the summary picture.
            truth: what is known to be true, for the summary picture.
            errors: for the summary picture; see `u4d.view.summary.write_summary`.
        Returns:
            The folder.
        Raises:
            UserError: the folder exists and may not be replaced, or can't be written.
        """
        from u4d.data.scene_folder import save_scene

        return save_scene(self, Path(folder), lossless, overwrite, source, truth, errors)


def _check_shape(name: str, value: Any, wanted: tuple[int | str, ...], sizes: dict[str, tuple[int, str]]) -> None:
    """Hold `value` against `wanted`; letters are sizes that every tensor shares and the first one sets."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{name}: expected a floating-point torch tensor, got {got}")
    shape = list(value.shape)
    setters = {sizes[letter][1] for letter in wanted if letter in sizes}
    filled = [sizes[w][0] if w in sizes else w for w in wanted]
    fits = len(shape) == len(filled) and all(
        w == s if isinstance(w, int) else s > 0 for w, s in zip(filled, shape, strict=True)
    )
    if not fits:
        expected = "[" + ",".join(map(str, wanted)) + "]"
        matching = f" to match {' and '.join(sorted(setters))}" if setters else " with no side 0"
        raise UserError(f"{name}: expected {expected}{matching}, got {_brackets(shape)}")
    for letter, size in zip(wanted, shape, strict=True):
        if isinstance(letter, str):
            sizes.setdefault(letter, (size, f"{name} {_brackets(shape)}"))


def _brackets(shape: list[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _checked_rgb(rgb: Tensor) -> Tensor:
    low, high = float(rgb.detach().min()), float(rgb.detach().max())
    if not (low >= -RGB_TOLERANCE and high <= 1 + RGB_TOLERANCE):
        raise UserError(f"rgb: expected values in [0,1], got {low:g} to {high:g} (bytes must be divided by 255)")
    return rgb.clamp(0, 1) if low < 0 or high > 1 else rgb


def _checked_depth(depth: Tensor) -> Tensor:
    valid = valid_depth(depth)
    if not bool(valid.any()):
        raise UserError(
            f"depth: expected pixels with finite depth > 0, got none in any frame (0 to {depth.shape[0] - 1}); "
            "leave depth out (None) where it is not known"
        )
    return depth if bool((valid | (depth == 0)).all()) else torch.where(valid, depth, torch.zeros_like(depth))


def _frame_list(indices: Sequence[int] | slice | Tensor, num_frames: int) -> list[int]:
    chosen = list(range(num_frames))[indices] if isinstance(indices, slice) else [int(i) for i in indices]
    outside = [i for i in chosen if not -num_frames <= i < num_frames]
    if outside or not chosen:
        got = f"frame {outside[0]}" if outside else "no frame"
        raise UserError(f"indices: expected frames between {-num_frames} and {num_frames - 1}, got {got}")
    return [i % num_frames for i in chosen]
