"""The consistency report: do images, depth and cameras of a completed scene agree under their own geometry?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from u4d.sample.search import CandidateScores


def consistency(scores: CandidateScores, residual: Tensor, best: int) -> dict[str, float | int]:
    """Numbers about one candidate.

    Args:
        scores: reprojection scores of all candidates.
        residual: `[L,N]` angular residual of each frame's camera fit, radians; inf where no camera was found.
        best: the candidate.
    Returns:
        reprojection_error: mean absolute RGB difference between frames warped onto each other, in [0,1];
        overlap: mean share of pixels compared; ray_residual_deg: median angle between the model's rays and those of
        the pinhole cameras fitted to them; frames_without_camera: how many frames allowed no fit.
    """
    found = residual[best][torch.isfinite(residual[best])]
    return {
        "reprojection_error": float(scores.error[best]),
        "overlap": float(scores.overlap[best].mean()) if scores.overlap.shape[-1] else 1.0,
        "ray_residual_deg": math.degrees(float(found.median())) if len(found) else math.inf,
        "frames_without_camera": int((~torch.isfinite(residual[best])).sum()),
    }
