"""Predictors that do not look at the clip: what a model must beat before its numbers mean anything (spec section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.geometry.alignment import nearest_rotation
from u4d.geometry.cameras import relative_to_first
from u4d.geometry.depth import channel_to_depth, clip_scale, depth_to_channel, valid_depth
from u4d.scene import Scene


@dataclass(frozen=True, eq=False)
class TrivialPriors:
    """What the training set says before anything is seen. Lengths are in scales: each clip is divided by its own first.

    Attributes:
        depth: [H, W], the mean over clips and frames of valid depth, taken in the model's depth channel: far pixels do
            not drown the rest there, and the map is harder to beat (AbsRel .43 against .82 on our own scenes). A pixel
            that never was valid has the map's farthest depth.
        motion: [N, 4, 4], the mean over clips of the path seen from the first camera: mean centres, chordal mean
            rotations.
        direction: [3], unit: where the last camera's centre lies on average, seen from the first camera.
        speed: mean distance from frame to frame.
        focal: geometric mean of fx / image width.
        clips: how many clips were averaged.
    """

    depth: Tensor
    motion: Tensor
    direction: Tensor
    speed: float
    focal: float
    clips: int


def fit_priors(scenes: Iterable[Scene]) -> TrivialPriors:
    """Average over training clips, in one pass; a clip's scale is the spec's, from its true depth (else its cameras).

    Args:
        scenes: clips with depth, intrinsics and cameras, all of the same N, H, W.
    Raises:
        UserError: no clip, a clip without depth or cameras, or clips of different sizes.
    """
    channel_sum = valid_count = rotation_sum = centre_sum = torch.zeros(())
    speed_sum = log_focal_sum = 0.0
    shape: list[int] | None = None
    clips = 0
    for scene in scenes:
        if scene.depth is None or scene.intrinsics is None or scene.cam_to_world is None:
            raise UserError(
                f"scenes: expected depth, intrinsics and cam_to_world in every clip, clip {clips} has not all"
            )
        shape = shape or list(scene.depth.shape)
        if list(scene.depth.shape) != shape:
            raise UserError(f"scenes: expected clips of one size {shape}, clip {clips} is {list(scene.depth.shape)}")
        scale = clip_scale(scene.depth, scene.cam_to_world)
        valid = valid_depth(scene.depth)
        channel = torch.where(valid, depth_to_channel(scene.depth.double(), scale), 0.0)
        channel_sum, valid_count = channel_sum + channel.sum(0), valid_count + valid.sum(0)
        path = relative_to_first(scene.cam_to_world.double())
        centres = path[:, :3, 3] / scale
        rotation_sum, centre_sum = rotation_sum + path[:, :3, :3], centre_sum + centres
        steps = torch.linalg.vector_norm(centres[1:] - centres[:-1], dim=-1)
        speed_sum += float(steps.mean()) if len(steps) else 0.0
        log_focal_sum += float((scene.intrinsics[:, 0, 0].double() / scene.image_size[1]).log().mean())
        clips += 1
    if clips == 0:
        raise UserError("scenes: expected at least one training clip, got none")
    depth = channel_to_depth(channel_sum / valid_count.clamp_min(1), 1.0)
    farthest = torch.where(valid_count > 0, depth, 0.0).max()
    return TrivialPriors(
        depth=torch.where(valid_count > 0, depth, farthest).float(),
        motion=_poses(nearest_rotation(rotation_sum / clips), centre_sum / clips),
        direction=_unit_or_forward(centre_sum[-1]).float(),
        speed=speed_sum / clips,
        focal=float(torch.tensor(log_focal_sum / clips, dtype=torch.float64).exp()),
        clips=clips,
    )


def mean_depth(priors: TrivialPriors, num_frames: int, image_size: tuple[int, int]) -> Tensor:
    """The training-mean depth map for every frame, [N, H, W] in scales."""
    depth = torch.nn.functional.interpolate(
        priors.depth[None, None], image_size, mode="bilinear", align_corners=False, antialias=True
    )
    return depth[0].expand(num_frames, -1, -1)


def constant_depth(num_frames: int, image_size: tuple[int, int]) -> Tensor:
    """Everything equally far, [N, H, W] in scales. On our own scenes its delta < 1.25 beats the mean map's."""
    return torch.ones(num_frames, *image_size)


def static_camera(num_frames: int) -> Tensor:
    """A camera that never moves, [N, 4, 4]."""
    return torch.eye(4).repeat(num_frames, 1, 1)


def straight_line(priors: TrivialPriors, num_frames: int) -> Tensor:
    """A camera that looks ahead and moves at the mean training speed along the mean training direction, [N, 4, 4]."""
    steps = torch.arange(num_frames)[:, None] * (priors.speed * priors.direction)
    return _poses(torch.eye(3).expand(num_frames, 3, 3), steps)


def mean_motion(priors: TrivialPriors, num_frames: int) -> Tensor:
    """The mean training path, [N, 4, 4], stretched in time over the clip where it has another number of frames."""
    known = priors.motion.shape[0]
    if known == num_frames or known == 1:
        return priors.motion.expand(num_frames, 4, 4)
    position = torch.linspace(0, known - 1, num_frames)
    before = position.floor().long().clamp(max=known - 2)
    weight = (position - before)[:, None, None]
    blend = priors.motion[before] * (1 - weight) + priors.motion[before + 1] * weight
    return _poses(nearest_rotation(blend[:, :3, :3]), blend[:, :3, 3])


def mean_intrinsics(priors: TrivialPriors, num_frames: int, image_size: tuple[int, int]) -> Tensor:
    """Square pixels, the mean training focal length relative to the width, centred principal point: [N, 3, 3]."""
    height, width = image_size
    intrinsics = torch.diag(torch.tensor([priors.focal * width, priors.focal * width, 1.0]))
    intrinsics[0, 2], intrinsics[1, 2] = width / 2, height / 2
    return intrinsics.repeat(num_frames, 1, 1)


def blend_frames(rgb: Tensor, observed: Sequence[int]) -> Tensor:
    """Fill frames by blending linearly in time between the nearest observed frames before and after.

    Args:
        rgb: [N, 3, H, W]; only the observed frames are read.
        observed: frame numbers, at least one. Before the first and after the last, that frame is repeated.
    Returns:
        [N, 3, H, W].
    Raises:
        UserError: nothing is observed.
    """
    if not observed:
        raise UserError("observed: expected at least one frame to blend from, got none")
    known = sorted(set(observed))
    frames = []
    for n in range(rgb.shape[0]):
        before = max((k for k in known if k <= n), default=known[0])
        after = min((k for k in known if k >= n), default=known[-1])
        weight = (n - before) / (after - before) if after > before else 0.0
        frames.append(torch.lerp(rgb[before], rgb[after], weight))
    return torch.stack(frames)


def _poses(rotation: Tensor, centres: Tensor) -> Tensor:
    poses = torch.eye(4).repeat(len(centres), 1, 1)
    poses[:, :3, :3], poses[:, :3, 3] = rotation.float(), centres.float()
    return poses


def _unit_or_forward(vector: Tensor) -> Tensor:
    """Training cameras without a preferred direction leave none; then ahead is as good as any."""
    length = torch.linalg.vector_norm(vector)
    return vector / length if length > 1e-9 else vector.new_tensor([0.0, 0.0, 1.0])
