"""What `Scene.report` says about a completion: what was given, how the search went, and whether the result agrees with
itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from u4d.sample.candidates import Drawn
from u4d.sample.given import Given
from u4d.sample.search import CandidateScores, candidate_spread


def describe(given: Given) -> dict[str, Any]:
    """What was observed, which of the scene's frames stand where in the clip, and the scale of the result."""
    return {
        "observe": given.spec,
        "frames": given.placement.kept.tolist(),
        "slots": given.placement.slots.tolist(),
        "scale": given.scale,
        "metric": given.metric,
        "notes": given.notes,
    }


def describe_search(scores: CandidateScores, depth: Tensor, best: int, drawn: Drawn) -> dict[str, Any]:
    """Which candidate was kept, the errors and overlaps of those that were finished, how far their depths `[K,N,H,W]`
    differ, and what was given up on the way.

    Args:
        scores: of the finished ones.
        depth: of the same.
        best: place of the one that was kept.
        drawn: all about them.
    """
    found: dict[str, Any] = {
        "best": drawn.numbers[best],
        "finished": drawn.numbers,
        "errors": scores.error.tolist(),
        "overlap": scores.overlap.mean(-1).tolist() if scores.overlap.shape[-1] else [],
    }
    if drawn.rounds:
        found["halving"] = [part.facts() for part in drawn.rounds]
    return found if len(depth) == 1 else found | {"depth_spread": candidate_spread(depth).cpu()}


def consistency(scores: CandidateScores, residual: Tensor, best: int) -> dict[str, float | int]:
    """Do images, depth and cameras of one candidate agree under their own geometry?

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
