"""How far a predicted camera path is from the true one.

ATE and RPE follow evo (Grupp 2017; `evo_ape -as`, `evo_rpe -as -d 1 -u f`). Sim(3) ATE cannot tell a model that only
knows "paths are smooth" from one that sees (a straight line scores well), so the direction of travel and the turn from
the first to the last frame stand beside it (spec, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.geometry.alignment import umeyama
from u4d.geometry.cameras import (
    check_intrinsics,
    check_rigid,
    invert_rigid,
    relative_to_first,
    rotation_angle_rad,
    rotation_to_quat_xyzw,
)

POSE_METRICS = (
    "ate",
    "ate_over_path",
    "rpe_t",
    "rpe_r_deg",
    "rotation_first_to_last_deg",
    "translation_direction_deg",
)
COMPONENTS = ("pitch", "yaw", "roll", "tx", "ty", "tz")
POSE_ALIGNMENT_TEXT = "Sim(3), Umeyama on camera centres, one per clip (ATE, RPE); none for rotation and direction"

DIRECTION_FRACTION = 0.1  # frames nearer to the start than this share of the clip's extent have no reliable direction


def pose_metrics(prediction: Tensor, truth: Tensor, *, min_motion: float = 1e-6) -> dict[str, float]:
    """Errors of one camera path.

    Args:
        prediction: [N, 4, 4] cam_to_world, in any world frame and at any scale.
        truth: [N, 4, 4] cam_to_world.
        min_motion: true displacement below which a frame has no direction, in the truth's unit.
    Returns:
        One number per name in `POSE_METRICS`; NaN where the clip does not define it.
        ate: RMSE of camera centres after Sim(3) alignment, in the truth's unit.
        ate_over_path: the same, divided by the length of the true path; NaN when the true camera stands still.
        rpe_t, rpe_r_deg: RMSE over frames of the relative motion's error from frame to frame, after the same alignment.
        rotation_first_to_last_deg: angle between predicted and true rotation from the first to the last frame.
        translation_direction_deg: median over frames n of the angle between predicted and true displacement 0 -> n,
            each seen in its own first camera's frame. Frames count whose true displacement exceeds both `min_motion`
            and a tenth of the clip's largest. A prediction that does not move there gets 90, which is chance. NaN when
            no frame counts.
        All NaN for a clip of one frame.
    Raises:
        UserError: shapes disagree, or matrices that are not rigid.
    """
    if prediction.shape != truth.shape or truth.ndim != 3 or truth.shape[0] == 0:
        raise UserError(f"prediction: expected [N, 4, 4] like truth {list(truth.shape)}, got {list(prediction.shape)}")
    check_rigid(prediction, "prediction")
    check_rigid(truth, "truth")
    if truth.shape[0] == 1:
        return dict.fromkeys(POSE_METRICS, math.nan)
    # In the first camera's frame the numbers stay small, wherever the world's origin is.
    p, t = relative_to_first(prediction.double()), relative_to_first(truth.double())
    scale, rotation, translation = umeyama(p[:, :3, 3], t[:, :3, 3])
    residual = scale * p[:, :3, 3] @ rotation.mT + translation - t[:, :3, 3]
    ate = float(residual.square().sum(-1).mean().sqrt())
    path = float(torch.linalg.vector_norm(t[1:, :3, 3] - t[:-1, :3, 3], dim=-1).sum())
    rpe_t, rpe_r_deg = _relative_errors(p, t, float(scale))
    turn = p[-1, :3, :3].mT @ t[-1, :3, :3]
    values = (
        ate,
        ate / path if path > 1e-9 else math.nan,
        rpe_t,
        rpe_r_deg,
        math.degrees(float(rotation_angle_rad(turn))),
        _direction_deg(p[:, :3, 3], t[:, :3, 3], min_motion),
    )
    return dict(zip(POSE_METRICS, values, strict=True))


def focal_error(prediction: Tensor, truth: Tensor) -> float:
    """Mean over frames and both axes of |f_predicted / f_true - 1|.

    Args:
        prediction, truth: [N, 3, 3] intrinsics, in pixels of the same image size.
    Raises:
        UserError: shapes disagree, or matrices that are no pinhole camera's.
    """
    if prediction.shape != truth.shape:
        raise UserError(f"prediction: expected [N, 3, 3] like truth {list(truth.shape)}, got {list(prediction.shape)}")
    check_intrinsics(prediction, "prediction")
    check_intrinsics(truth, "truth")
    focal_p, focal_t = (k.double().diagonal(dim1=-2, dim2=-1)[..., :2] for k in (prediction, truth))
    return float((focal_p / focal_t - 1).abs().mean())


def motion_components(cam_to_world: Tensor, scale: float) -> Tensor:
    """First-to-last motion as six numbers [6], in the order of `COMPONENTS`.

    Args:
        cam_to_world: [N, 4, 4].
        scale: the clip's scale, in the unit of the camera centres.
    Returns:
        Pitch, yaw, roll: the rotation vector about the first camera's x, y, z axis, degrees. tx, ty, tz: the last
        camera's centre in the first camera's frame, in scales.
    """
    last = relative_to_first(cam_to_world.double())[-1]
    quat = rotation_to_quat_xyzw(last[:3, :3])
    sine = torch.linalg.vector_norm(quat[:3])
    angle = 2 * torch.atan2(sine, quat[3])
    axis = quat[:3] / sine.clamp_min(1e-300)
    return torch.cat([torch.rad2deg(angle * axis), last[:3, 3] / scale])


def component_correlations(predictions: Sequence[Tensor], truths: Sequence[Tensor]) -> dict[str, float]:
    """Pearson correlation over clips of each component of the first-to-last motion.

    This is the number to watch while pose is being learned: it leaves zero before ATE moves at all.

    Args:
        predictions, truths: one [6] per clip, from `motion_components`.
    Returns:
        {component: r}; NaN for fewer than three clips, or where a side does not vary (a constant predicts nothing).
    Raises:
        UserError: not as many predictions as truths.
    """
    if len(predictions) != len(truths):
        raise UserError(f"predictions: expected one per truth ({len(truths)}), got {len(predictions)}")
    if len(truths) < 3:
        return dict.fromkeys(COMPONENTS, math.nan)
    p, t = torch.stack(list(predictions)).double(), torch.stack(list(truths)).double()
    p, t = p - p.mean(0), t - t.mean(0)
    spread_p, spread_t = p.square().mean(0).sqrt(), t.square().mean(0).sqrt()
    r = (p * t).mean(0) / (spread_p * spread_t)
    varies = (spread_p > 1e-9) & (spread_t > 1e-9)
    r = torch.where(varies, r, torch.full_like(r, math.nan))
    return dict(zip(COMPONENTS, r.tolist(), strict=True))


def _relative_errors(p: Tensor, t: Tensor, scale: float) -> tuple[float, float]:
    """RMSE of the error of frame-to-frame motion, (translation, rotation in degrees), `p` scaled by `scale` first."""
    p = p.clone()
    p[:, :3, 3] *= scale
    step_p, step_t = (invert_rigid(path[:-1]) @ path[1:] for path in (p, t))
    error = invert_rigid(step_t) @ step_p
    rpe_t = error[:, :3, 3].square().sum(-1).mean().sqrt()
    rpe_r = torch.rad2deg(rotation_angle_rad(error[:, :3, :3])).square().mean().sqrt()
    return float(rpe_t), float(rpe_r)


def _direction_deg(p: Tensor, t: Tensor, min_motion: float) -> float:
    """Median angle between displacements [N, 3] that start at zero; see `pose_metrics`."""
    length = torch.linalg.vector_norm(t, dim=-1)
    counts = (length > min_motion) & (length > DIRECTION_FRACTION * length.max())
    if not bool(counts.any()):
        return math.nan
    p, t = p[counts], t[counts]
    sine = torch.linalg.vector_norm(torch.linalg.cross(p, t), dim=-1)
    angle = torch.rad2deg(torch.atan2(sine, (p * t).sum(-1)))
    still = torch.linalg.vector_norm(p, dim=-1) <= 1e-12
    angle = torch.where(still, torch.full_like(angle, 90.0), angle)
    return float(angle.quantile(0.5))
