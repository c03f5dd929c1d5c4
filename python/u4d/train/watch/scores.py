"""The few numbers that training watches, over a batch of clips. `u4d.evaluate` has all of them, clip by clip."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from u4d.geometry.cameras import relative_to_first, rotation_angle_rad, rotation_to_quat_xyzw
from u4d.geometry.depth import valid_depth

COMPONENTS = ("pitch", "yaw", "roll", "tx", "ty", "tz")
DIRECTION_FRACTION = 0.1  # frames nearer to the start than this share of the clip's extent have no reliable direction


def depth_errors(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """AbsRel and the share of pixels with max(p/t, t/p) < 1.25, after each clip's prediction is given the true median.

    Args:
        prediction: `[B,N,H,W]` depth, positive.
        truth: `[B,N,H,W]`; invalid pixels do not count.
    Returns:
        `[B]` each, float64; NaN for a clip without a valid true pixel.
    """
    errors = []
    for predicted, true in zip(prediction, truth, strict=True):
        counts = valid_depth(true)
        p, t = predicted[counts].double(), true[counts].double()
        p = p * (t.median() / p.median())
        close = torch.maximum(p / t, t / p) < 1.25
        errors.append(torch.stack([((p - t).abs() / t).mean(), close.double().mean()]))
    abs_rel, delta = torch.stack(errors).unbind(-1)
    return abs_rel, delta


def direction_errors_deg(prediction: Tensor, truth: Tensor, min_motion: Tensor) -> Tensor:
    """Median over frames of the angle between predicted and true displacement from the first camera, in its frame.

    Args:
        prediction, truth: cam_to_world `[B,N,4,4]`.
        min_motion: `[B]` true displacement below which a frame has no direction, in the truth's unit.
    Returns:
        `[B]` degrees, float64; 90 (chance) where the prediction stands still, NaN where the true camera does.
    """
    p, t = (relative_to_first(path.double())[..., :3, 3] for path in (prediction, truth))
    length = torch.linalg.vector_norm(t, dim=-1)
    counts = (length > min_motion[:, None]) & (length > DIRECTION_FRACTION * length.amax(-1, keepdim=True))
    sine = torch.linalg.vector_norm(torch.linalg.cross(p, t), dim=-1)
    angle = torch.rad2deg(torch.atan2(sine, (p * t).sum(-1)))
    still = torch.linalg.vector_norm(p, dim=-1) <= 1e-12
    angle = angle.masked_fill(still, 90.0).masked_fill(~counts, math.nan)
    return angle.nanquantile(0.5, dim=-1)


def turn_errors_deg(prediction: Tensor, truth: Tensor) -> Tensor:
    """Angle between predicted and true rotation from the first to the last frame.

    Args:
        prediction, truth: cam_to_world `[B,N,4,4]`.
    Returns:
        `[B]` degrees, float64.
    """
    p, t = (relative_to_first(path.double())[:, -1, :3, :3] for path in (prediction, truth))
    return torch.rad2deg(rotation_angle_rad(p.mT @ t))


def motion_components(cam_to_world: Tensor, scale: Tensor) -> Tensor:
    """First-to-last motion in the order of `COMPONENTS`.

    Args:
        cam_to_world: `[B,N,4,4]`.
        scale: `[B]`, in the unit of the camera centres.
    Returns:
        `[B,6]` float64: the rotation vector about the first camera's x, y, z axis in degrees; the last camera's centre
        in the first camera's frame, in scales.
    """
    last = relative_to_first(cam_to_world.double())[:, -1]
    quat = rotation_to_quat_xyzw(last[:, :3, :3])
    sine = torch.linalg.vector_norm(quat[:, :3], dim=-1, keepdim=True)
    angle = torch.rad2deg(2 * torch.atan2(sine, quat[:, 3:]))
    return torch.cat([angle * quat[:, :3] / sine.clamp_min(1e-300), last[:, :3, 3] / scale[:, None]], dim=-1)


def correlations(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """Pearson correlation over clips of each component of the motion, `[B,6]` each.

    It leaves zero before any error of the pose moves. NaN for fewer than three clips, or where a side does not vary.
    """
    if len(truth) < 3:
        return dict.fromkeys(COMPONENTS, math.nan)
    p, t = prediction - prediction.mean(0), truth - truth.mean(0)
    spread_p, spread_t = p.square().mean(0).sqrt(), t.square().mean(0).sqrt()
    r = (p * t).mean(0) / (spread_p * spread_t)
    varies = (spread_p > 1e-9) & (spread_t > 1e-9)
    return dict(zip(COMPONENTS, r.masked_fill(~varies, math.nan).tolist(), strict=True))
