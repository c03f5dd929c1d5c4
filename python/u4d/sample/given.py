"""What a completion starts from: the observed part of a scene, laid out as the model's clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from u4d.clips import Clips
from u4d.geometry.cameras import relative_to_first
from u4d.geometry.depth import STATIC_EXTENT, clip_scale, valid_depth
from u4d.geometry.smoothing import smooth_path
from u4d.sample.observation import (
    Observation,
    check_scene_has,
    observed_groups,
    parse_observation,
    partially_observed,
    usable_frames,
)
from u4d.sample.placement import Placement, observed_clip, place_frames, place_observation
from u4d.scene import Scene


@dataclass(frozen=True)
class Given:
    """One clip of observations.

    Attributes:
        clip: a batch of one that holds what is observed and nothing else.
        observation: which frames those are.
        placement: where the scene's frames stand in the clip.
        spec: the observation as text, over the scene's own frames.
        anchor: `[4,4]` pose of the first observed camera, which the model sees as the identity; None without one.
        scale: units of length per model unit, from what is observed (spec.md section 1).
        metric: whether the observations set that scale; otherwise lengths are relative.
        fps: frames per second of the clip.
        notes: what the user should know about observations that could not be used.
    """

    clip: Clips
    observation: Observation
    placement: Placement
    spec: str
    anchor: Tensor | None
    scale: float
    metric: bool
    fps: float
    notes: list[str]

    @property
    def groups(self) -> Tensor:
        """bool `[4,F]`: the observed (stream, latent frame) groups."""
        return observed_groups(self.observation).to(self.clip.device)


def prepare(
    scene: Scene, observe: str, frames: int | None, most: int, image_size: tuple[int, int], device: torch.device
) -> Given:
    """Lay out what `observe` names of a scene as a clip of `frames` (at most `most`) frames of `image_size`.

    Raises:
        UserError: the observation does not fit the scene or the clip.
    """
    asked = parse_observation(observe, scene.num_frames)
    check_scene_has(asked, scene)
    placement = place_frames(scene.num_frames, frames, most)
    placed, notes = place_observation(asked, placement)
    observation = usable_frames(placed)
    clip = observed_clip(scene, placement, observation, image_size).to(device)
    scale, metric = scale_of(clip, observation)
    return Given(
        clip=clip,
        observation=observation,
        placement=placement,
        spec=asked.spec,
        anchor=anchor_of(clip, observation),
        scale=scale,
        metric=metric,
        fps=scene.frames(placement.kept).fps,
        notes=notes + partially_observed(placed),
    )


def anchor_of(clip: Clips, observation: Observation) -> Tensor | None:
    """Pose `[4,4]` of the first observed camera: the model sees it as the identity. None where none is observed."""
    if clip.cam_to_world is None:
        return None
    return clip.cam_to_world[0, int(observation.camera.nonzero()[0])]


def lens_of(clip: Clips, observation: Observation) -> Tensor | None:
    """`[3,3]` of the observed cameras where they all have the same lens; None where they differ, or there are none."""
    if clip.intrinsics is None:
        return None
    seen = clip.intrinsics[0, observation.camera.to(clip.device)]
    return seen[0] if bool((seen == seen[0]).all()) else None


def scale_of(clip: Clips, observation: Observation) -> tuple[float, bool]:
    """The clip's scale from what is observed (spec.md section 1), and whether that makes lengths metric."""
    cameras = None if clip.cam_to_world is None else clip.cam_to_world[0, observation.camera.to(clip.device)]
    moves = cameras is not None and float((cameras - cameras[:1])[:, :3, 3].norm(dim=-1).max()) > STATIC_EXTENT
    return clip_scale(clip.depth, cameras), clip.depth is not None or moves


def hold_observed(clip: Clips, observation: Observation) -> Clips:
    """The clip with each unobserved image and depth map replaced by the nearest observed one.

    A causal codec also sees the frames before an observed group. They decide nothing, but black ones would be far from
    anything that it knows.
    """
    return replace(
        clip,
        rgb=None if clip.rgb is None else clip.rgb[:, nearest_observed(observation.rgb).to(clip.device)],
        depth=None if clip.depth is None else clip.depth[:, nearest_observed(observation.depth).to(clip.device)],
    )


def nearest_observed(observed: Tensor) -> Tensor:
    """`[N]` bool, at least one True -> `[N]` int64: the nearest frame that is observed, the earlier of two."""
    frames, seen = torch.arange(len(observed)), observed.nonzero()[:, 0]
    return seen[(frames[:, None] - seen).abs().argmin(1)]


def keep_observed(drawn: Clips, given: Given, smoothing: float = 0.0) -> Clips:
    """Put the input's own images, depths and cameras in place of their coded copies, in the input's world frame.

    Where no camera is observed, the drawn path is smoothed over `smoothing` frames.
    """
    rgb, depth, intrinsics, cam_to_world = drawn.everything()
    device = rgb.device
    clip, observation = given.clip, given.observation
    if clip.rgb is not None:
        rgb = torch.where(observation.rgb.to(device)[:, None, None, None], clip.rgb, rgb)
    if clip.depth is not None:
        depth = torch.where(valid_depth(clip.depth), clip.depth, depth)
    if given.anchor is None or clip.cam_to_world is None or clip.intrinsics is None:
        return Clips(rgb, depth, intrinsics, relative_to_first(smooth_path(cam_to_world, smoothing)))
    seen = observation.camera.to(device)[:, None, None]
    cam_to_world = torch.where(seen, clip.cam_to_world, given.anchor @ cam_to_world)
    return Clips(rgb, depth, torch.where(seen, clip.intrinsics, intrinsics), cam_to_world)
