"""A stand-in for `Pipeline.complete` that knows the truth and honours observations as the real one does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from u4d.sample.observation import parse_observation
from u4d.scene import Scene

COUNTED = 1000  # the red of frame k is k / COUNTED, so that a window can be told by its pictures


def turn(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Tensor:
    """A rotation [3,3], float64."""
    skew = torch.tensor([[0.0, -roll, yaw], [roll, 0.0, -pitch], [-yaw, pitch, 0.0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(skew)


def similar(scene: Scene, scale: float, rotation: Tensor, translation: Tensor) -> Scene:
    """The scene in another world frame and unit."""
    poses = scene.cam_to_world.double()
    moved = poses.clone()
    moved[:, :3, 3] = scale * poses[:, :3, 3] @ rotation.mT + translation
    moved[:, :3, :3] = rotation @ poses[:, :3, :3]
    return Scene(rgb=scene.rgb, depth=scene.depth * scale, intrinsics=scene.intrinsics, cam_to_world=moved.float())


def walk(frames: int, size: tuple[int, int] = (8, 8)) -> Scene:
    """A known clip: a curved path with changing depth. Metres; the first camera is not the identity."""
    time = torch.arange(frames, dtype=torch.float64)
    poses = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    for k in range(frames):
        poses[k, :3, :3] = turn(0.3 + 0.03 * k, 0.1 * torch.sin(0.2 * time[k]).item())
    poses[:, :3, 3] = torch.stack([0.2 * time, torch.cos(0.1 * time), 0.1 * time - 2], dim=-1)
    ramp = torch.linspace(2, 6, size[0] * size[1], dtype=torch.float64).reshape(size)
    depth = ramp * (1 + 0.3 * torch.sin(0.15 * time))[:, None, None]
    rgb = torch.full((frames, 3, *size), 0.5)
    rgb[:, 0] = (time.float() / COUNTED)[:, None, None]
    intrinsics = torch.tensor([[9.0, 0, 4], [0, 9, 4], [0, 0, 1]]).repeat(frames, 1, 1)
    return Scene(rgb=rgb, depth=depth.float(), intrinsics=intrinsics, cam_to_world=poses.float())


@dataclass
class HonestModel:
    """Answers with the truth, in the frame of the first observed camera and the unit that the observations set.

    Where no camera is observed the first one is the identity, and where nothing sets a unit it is arbitrary. With `off`
    whatever is not observed is off by an arbitrary similarity, another one in every window.
    """

    truth: Scene
    off: bool = False
    seen: list[tuple[Scene, dict[str, Any]]] = field(default_factory=list)
    drawn: list[Scene] = field(default_factory=list)

    def __call__(
        self, scene: Scene, observe: str, seed: int, progress: Any, spread: bool = False, **settings: Any
    ) -> Scene:
        self.seen.append((scene, {"observe": observe, "seed": seed, **settings}))
        observed = parse_observation(observe, scene.num_frames)
        start = round(float(scene.rgb[0, 0, 0, 0]) * COUNTED)
        exact = Scene(
            rgb=self.truth.rgb[start : start + scene.num_frames],
            depth=self.truth.depth[start : start + scene.num_frames],
            intrinsics=self.truth.intrinsics[start : start + scene.num_frames],
            cam_to_world=self.truth.cam_to_world[start : start + scene.num_frames],
        )
        unit, metric = self.unit(scene, exact, observed)
        anchor = int(observed.camera.nonzero()[0]) if bool(observed.camera.any()) else 0
        world = scene.cam_to_world[anchor].double() if bool(observed.camera.any()) else torch.eye(4).double()
        own = exact.cam_to_world[anchor].double()
        rotation = world[:3, :3] @ own[:3, :3].mT
        answer = similar(exact, unit, rotation, world[:3, 3] - unit * rotation @ own[:3, 3])
        if self.off and len(self.seen) > 1:
            k = len(self.seen)
            # It is off in the frame that it works in, where the anchor is the identity: all but the anchor moves.
            answer = similar(
                answer, 1 + 0.1 * (-1) ** k, turn(0.02 * k, -0.03), torch.tensor([0.3, -0.1 * k, 0.2]).double()
            )
        answer = Scene(
            rgb=torch.where(observed.rgb[:, None, None, None], scene.rgb, answer.rgb),
            depth=answer.depth
            if scene.depth is None
            else torch.where(observed.depth[:, None, None], scene.depth, answer.depth),
            intrinsics=answer.intrinsics,
            cam_to_world=answer.cam_to_world
            if scene.cam_to_world is None
            else torch.where(observed.camera[:, None, None], scene.cam_to_world, answer.cam_to_world),
            fps=scene.fps,
            scale=unit,
            report={
                **{"observe": observe, "scale": unit, "metric": metric, "seed": seed, "steps": 3, "guidance": 1.5},
                **{"notes": ["the same in every window"], "timings_s": {"denoise": 2.0, "decode": 0.5}},
                **{"best": 0, "errors": [0.1], "overlap": [0.5]},
                "consistency": {
                    **{"reprojection_error": 0.1, "overlap": 0.5},
                    **{"ray_residual_deg": float(len(self.seen)), "frames_without_camera": 1},
                },
            },
        )
        if spread:
            answer.report["depth_spread"] = torch.full_like(answer.depth, float(len(self.seen)))
        if progress is not None:
            progress("denoise", 1, 2)
            progress("denoise", 2, 2)
        self.drawn.append(answer)
        return answer

    def unit(self, scene: Scene, exact: Scene, observed: Any) -> tuple[float, bool]:
        """Units per metre, and whether the observations tell them."""
        if bool(observed.depth.any()):
            return float((scene.depth[observed.depth] / exact.depth[observed.depth]).median()), True
        if int(observed.camera.sum()) > 1:
            given, true = (s.cam_to_world[observed.camera, :3, 3] for s in (scene, exact))
            return float((given[-1] - given[0]).norm() / (true[-1] - true[0]).norm()), True
        return 1 / (3.0 + len(self.seen)), False
