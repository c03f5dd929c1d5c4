"""One result out of windows: the frames so far, what they give to the next window, and the offset between the two.

Observed cameras set a window's world frame and observed depth sets its unit (given.py), so a window that is given part
of the result so far answers in that frame and unit. A model that does not quite follow what it is given is off by a
similarity; it is measured on frames that both windows have answered, and taken out. What the user gives in a window
stands in the user's own frame and unit, and is never moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from u4d.geometry.alignment import nearest_rotation
from u4d.geometry.cameras import rotation_angle_rad
from u4d.geometry.depth import valid_depth
from u4d.sample.observation import Observation
from u4d.sample.window_plan import Window
from u4d.scene import Scene

PARTS = ("rgb", "depth", "intrinsics", "cam_to_world")


@dataclass(frozen=True, eq=False)
class Film:
    """All frames of the result; those of the windows that are done hold values.

    Attributes:
        rgb, depth, intrinsics, cam_to_world: as in a scene, written in place.
        spread: `[N,H,W]` candidates' spread in depth, where there are several.
    """

    rgb: Tensor
    depth: Tensor
    intrinsics: Tensor
    cam_to_world: Tensor
    spread: Tensor | None

    @staticmethod
    def like(first: Scene, num_frames: int) -> Film:
        """An empty one, for windows that come like the first one's result."""
        spread = first.report.get("depth_spread")
        empty = {name: blank(getattr(first, name), num_frames) for name in PARTS}
        return Film(**empty, spread=None if spread is None else blank(spread, num_frames))

    def put(self, fresh: Scene, window: Window) -> None:
        """Write a window's frames, without those that keep the earlier result."""
        here, new = slice(window.start + window.kept, window.stop), slice(window.kept, None)
        for name in PARTS:
            getattr(self, name)[here] = getattr(fresh, name)[new]
        if self.spread is not None:
            self.spread[here] = fresh.report["depth_spread"][new]


def blank(like: Tensor, num_frames: int) -> Tensor:
    """Zeros of the same kind for so many frames."""
    return like.new_zeros(num_frames, *like.shape[1:])


def window_scene(scene: Scene, film: Film, window: Window) -> Scene:
    """A window's frames of the user's scene, the first ones replaced by the result so far (see `Window`).

    What the user's scene does not hold is blank there: it is not observed.
    """
    begin, stop = window.start, window.stop
    parts: dict[str, Any] = {}
    for name in PARTS:
        result: Tensor = getattr(film, name)
        carried = window.kept if name == "rgb" else window.given
        own: Tensor | None = getattr(scene, name)
        if own is None:
            blanks = {"intrinsics": result[begin], "cam_to_world": torch.eye(4)}
            rest = blanks.get(name, torch.zeros_like(result[begin])).to(result)
            rest = rest.expand(stop - begin - carried, *rest.shape)
        else:
            rest = own[begin + carried : stop].to(result)
        parts[name] = torch.cat([result[begin : begin + carried], rest])
    return replace(scene, **parts, report={})


@dataclass(frozen=True, eq=False)
class Similarity:
    """`x -> scale * rotation x + translation`, float64."""

    scale: float
    rotation: Tensor  # [3,3]
    translation: Tensor  # [3]

    def move(self, scene: Scene) -> Scene:
        """A scene with depth and cameras."""
        depth, poses = scene.depth, scene.cam_to_world
        if depth is None or poses is None:
            raise ValueError("scene: expected one with depth and cam_to_world")
        moved = poses.double()
        moved[:, :3, 3] = self.scale * moved[:, :3, 3] @ self.rotation.mT + self.translation
        moved[:, :3, :3] = nearest_rotation(self.rotation @ moved[:, :3, :3])  # rounding must not add up over windows
        return replace(scene, depth=depth * self.scale, cam_to_world=moved.to(poses))

    @property
    def facts(self) -> dict[str, float]:
        """What it does, in numbers."""
        turn = math.degrees(float(rotation_angle_rad(self.rotation)))
        return {"scale": self.scale, "rotation_deg": turn, "translation": float(self.translation.norm())}


def offset(film: Film, fresh: Scene, window: Window, own: Observation) -> Similarity | None:
    """The similarity that takes a window's answers to the earlier result, by the frames compared.

    The scale is that of the depths (median of the log ratio), since a few camera centres close together hardly tell
    one; rotation and translation are means over the cameras.

    Args:
        film: the result so far.
        fresh: the window's answers, in the frame and unit of what it was given.
        window: its frames `given` to `kept - 1` are compared.
        own: what the window sees of the user's own. Cameras: the world frame and unit are the user's, and there is
            nothing to take out. Depth: the unit is.
    Returns:
        None where there is nothing to take out, or nothing to compare.
    """
    compared = slice(window.given, window.kept)
    if window.given >= window.kept or bool(own.camera.any()):
        return None
    if fresh.depth is None or fresh.cam_to_world is None:
        raise ValueError("fresh: expected a scene with depth and cam_to_world")
    earlier = slice(window.start + window.given, window.start + window.kept)
    scale = 1.0 if bool(own.depth.any()) else depth_ratio(film.depth[earlier], fresh.depth[compared])
    before, after = film.cam_to_world[earlier].double(), fresh.cam_to_world[compared].double()
    rotation = nearest_rotation((before[:, :3, :3] @ after[:, :3, :3].mT).mean(0))
    translation = (before[:, :3, 3] - scale * after[:, :3, 3] @ rotation.mT).mean(0)
    return Similarity(scale, rotation, translation)


def depth_ratio(before: Tensor, after: Tensor) -> float:
    """Median of before / after over the pixels that are valid in both; 1 where there are none."""
    both = valid_depth(before) & valid_depth(after)
    if not bool(both.any()):
        return 1.0
    return float((before[both].double() / after[both].double()).median())
