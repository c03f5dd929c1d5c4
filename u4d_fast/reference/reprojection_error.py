"""How well the frames of a clip agree under their own depth and cameras, in plain torch.

Source: the seed's section on test-time search, equation for e^(l).
"""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast.reference.warp_frames import warp_frames


def reprojection_error(
    rgb: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    *,
    occlusion: float | None = 0.05,
) -> tuple[Tensor, Tensor, Tensor]:
    """Photometric reprojection error: the specification of `u4d_fast.reprojection_error`, which documents it.

    Any floating dtype. Pair by pair, so that nothing of size M*H*W is stored. Sums are taken in float64.
    """
    scores = [
        score_pair(rgb, depth, intrinsics, cam_to_world, pairs[m : m + 1], occlusion) for m in range(pairs.shape[0])
    ]
    errors, overlaps = zip(*scores, strict=True)
    pair_error, overlap = torch.stack(errors, 1), torch.stack(overlaps, 1)
    return pair_error.mean(1).to(rgb.dtype), pair_error.to(rgb.dtype), overlap.to(rgb.dtype)


def score_pair(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pair: Tensor, occlusion: float | None
) -> tuple[Tensor, Tensor]:
    """Error and overlap of one pair [1,2]: [B] and [B] float64."""
    warped, valid = warp_frames(rgb, depth, intrinsics, cam_to_world, pair, occlusion=occlusion)
    difference = (warped - rgb[:, pair[:, 1]]).abs().sum(2)
    difference = torch.where(valid, difference, torch.zeros_like(difference)).sum((1, 2, 3), dtype=torch.float64)
    visible = valid.sum((1, 2, 3)).double()
    error = torch.where(visible > 0, difference / (3 * visible).clamp(min=1), torch.ones_like(visible))
    error = torch.where(error.isfinite(), error, torch.full_like(error, torch.inf))
    return error, visible / max(valid[0].numel(), 1)
