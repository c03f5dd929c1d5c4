"""How far predicted depth is from true depth (Eigen et al. 2014, section 4.3), the alignment named in the result."""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.geometry.depth import valid_depth

DepthAlignment = Literal["none", "scale", "scale_shift"]

ALIGNMENT_TEXT: dict[str, str] = {
    "none": "none (metric)",
    "scale": "scale: median(truth) / median(prediction), one per clip",
    "scale_shift": "scale and shift: least squares in depth, one pair per clip",
}


class DepthMetrics(TypedDict):
    """What `depth_metrics` returns."""

    abs_rel: float
    rmse: float
    delta_1_25: float
    alignment: str


def depth_metrics(prediction: Tensor, truth: Tensor, *, alignment: DepthAlignment = "scale") -> DepthMetrics:
    """AbsRel, RMSE and delta < 1.25 of one clip over the pixels whose true depth is valid.

    Args:
        prediction: [N, H, W] depth, finite wherever the truth is valid.
        truth: [N, H, W] depth; invalid pixels are 0, NaN or infinite and do not count.
        alignment: how the prediction is brought to the truth, once for the whole clip. "scale": by the ratio of the two
            medians. "scale_shift": by the a, b that minimise sum (a prediction + b - truth)^2, so in depth and not in
            disparity. "none": not at all.
    Returns:
        `abs_rel` mean |p - t| / t; `rmse` in the truth's unit; `delta_1_25` the share of pixels with
        max(p/t, t/p) < 1.25 (an aligned depth that is not positive fails); `alignment` in words.
    Raises:
        UserError: shapes disagree, no valid true pixel, or a prediction that is not finite where it counts.
    """
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise UserError(f"prediction: expected [N, H, W] like truth {list(truth.shape)}, got {list(prediction.shape)}")
    if alignment not in get_args(DepthAlignment):
        raise UserError(f"alignment: expected one of {', '.join(get_args(DepthAlignment))}, got {alignment!r}")
    counts = valid_depth(truth)
    if not bool(counts.any()):
        raise UserError("truth: expected at least one valid pixel (finite and positive), got none")
    p, t = prediction[counts].double(), truth[counts].double()
    if not bool(torch.isfinite(p).all()):
        raise UserError("prediction: expected finite depth wherever the truth is valid, got NaN or infinity")
    p = _align(p, t, alignment)
    ratio = torch.where(p > 0, torch.maximum(p / t, t / p), torch.full_like(p, torch.inf))
    return DepthMetrics(
        abs_rel=float(((p - t).abs() / t).mean()),
        rmse=float((p - t).square().mean().sqrt()),
        delta_1_25=float((ratio < 1.25).double().mean()),
        alignment=ALIGNMENT_TEXT[alignment],
    )


def _align(p: Tensor, t: Tensor, alignment: str) -> Tensor:
    if alignment == "none":
        return p
    if alignment == "scale":
        middle = p.median()
        if middle <= 0:
            raise UserError("prediction: expected positive depth to align its scale, got a median that is not positive")
        return p * (t.median() / middle)
    offset = p - p.mean()
    variance = offset.square().mean()
    # A constant prediction has no slope to solve for: the shift alone is then the least-squares answer.
    slope = (offset * (t - t.mean())).mean() / variance if variance > 0 else torch.zeros_like(variance)
    return t.mean() + slope * offset
