"""Test-time search: draw several completions, keep the one whose images, depth and cameras agree best.

Source: the seed's section "Test-time search (TTS)", spec.md section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import u4d_fast
from u4d.diffusion.flow import draw_noise

DEFAULT_ANCHORS = 8
MIN_OVERLAP = 0.1
MIN_RELATIVE_OVERLAP = 0.5


@dataclass(frozen=True)
class CandidateScores:
    """How well each candidate's images warp onto each other by its own depth and cameras."""

    error: Tensor  # [L], mean over pairs of the masked mean absolute RGB difference (the seed's e)
    pair_error: Tensor  # [L,M]
    overlap: Tensor  # [L,M], share of pixels that the pair's comparison covers
    pairs: Tensor  # [M,2] int64, ordered frame pairs


@dataclass(frozen=True)
class CandidateChoice:
    """The outcome of a search; see `choose_candidate`."""

    best: int
    order: Tensor  # [L] int64, best first
    error: Tensor  # [L], by which they are ranked: no reward for pairs that hardly overlap


def anchor_frames(num_frames: int, anchors: int = DEFAULT_ANCHORS) -> Tensor:
    """[A] int64: evenly spaced frames, first and last among them; all frames where the clip has fewer.

    Raises:
        ValueError: num_frames < 1 or anchors < 2.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
    if anchors < 2:
        raise ValueError(f"anchors: expected at least 2, got {anchors}")
    count = min(anchors, num_frames)
    return torch.linspace(0, num_frames - 1, count, dtype=torch.float64).round().long()


def anchor_pairs(num_frames: int, anchors: int = DEFAULT_ANCHORS) -> Tensor:
    """[M,2] int64: all ordered pairs of different anchor frames, M = A (A - 1)."""
    frames = anchor_frames(num_frames, anchors)
    first, second = torch.meshgrid(frames, frames, indexing="ij")
    pairs = torch.stack([first.flatten(), second.flatten()], dim=-1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def score_candidates(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, *, anchors: int = DEFAULT_ANCHORS
) -> CandidateScores:
    """Cross-frame photometric reprojection error of every candidate, by its own geometry.

    Args:
        rgb: [L,N,3,H,W] in [0,1].
        depth: [L,N,H,W], in the unit of the cameras.
        intrinsics: [L,N,3,3], pixels of H x W.
        cam_to_world: [L,N,4,4].
        anchors: number of anchor frames; all their ordered pairs are compared.
    Returns:
        Scores. A clip of one frame has no pairs: its errors are 0.
    Raises:
        ValueError: shapes disagree.
    """
    if rgb.ndim != 5:
        raise ValueError(f"rgb: expected [L,N,3,H,W], got {list(rgb.shape)}")
    pairs = anchor_pairs(rgb.shape[1], anchors).to(rgb.device)
    if len(pairs) == 0:
        none = rgb.new_zeros(rgb.shape[0], 0)
        return CandidateScores(error=rgb.new_zeros(rgb.shape[0]), pair_error=none, overlap=none, pairs=pairs)
    error, pair_error, overlap = u4d_fast.reprojection_error(rgb, depth, intrinsics, cam_to_world, pairs)
    return CandidateScores(error=error, pair_error=pair_error, overlap=overlap, pairs=pairs)


def choose_candidate(
    scores: CandidateScores,
    *,
    min_overlap: float = MIN_OVERLAP,
    min_relative_overlap: float = MIN_RELATIVE_OVERLAP,
) -> CandidateChoice:
    """The candidate of least error, where a pair with too little overlap is not allowed to win.

    The seed's error is an average over what overlaps, so a candidate whose cameras look away from each other would
    score near zero. Therefore a pair counts for a candidate only if its overlap is at least `min_overlap` and at least
    `min_relative_overlap` times the candidates' median overlap of that pair; otherwise it counts with the largest
    error that any candidate with enough overlap has there. Pairs that no candidate covers (the camera really turns
    away) are left out for all. With both limits 0 the ranking is the seed's. Candidates without a finite error come
    last, and equal ones keep their order.

    Raises:
        ValueError: there is no candidate.
    """
    if len(scores.error) == 0:
        raise ValueError("scores: expected at least one candidate, got none")
    if scores.pair_error.shape[1] == 0:
        ranked = scores.error.double()
    else:
        ranked = _guarded_error(scores.pair_error.double(), scores.overlap.double(), min_overlap, min_relative_overlap)
    order = torch.where(ranked.isfinite(), ranked, torch.inf).argsort(stable=True)
    return CandidateChoice(best=int(order[0]), order=order, error=ranked)


def _guarded_error(pair_error: Tensor, overlap: Tensor, min_overlap: float, min_relative: float) -> Tensor:
    """[L]: mean over pairs, where too little overlap counts as the worst error among the others."""
    needed = (min_relative * overlap.median(dim=0).values).clamp_min(min_overlap)
    enough = overlap >= needed
    worst = torch.where(enough & pair_error.isfinite(), pair_error, -torch.inf).amax(dim=0)
    covered = worst.isfinite()
    if not bool(covered.any()):
        return pair_error.mean(dim=-1)
    return torch.where(enough, pair_error, worst)[:, covered].mean(dim=-1)


def candidate_spread(depth: Tensor, *, align: bool = True) -> Tensor:
    """How much the candidates disagree about depth, relatively: the standard deviation of log depth.

    Args:
        depth: [L,N,H,W]; invalid pixels are 0 or not finite and are left out.
        align: first bring every candidate to a common scale, by the median over pixels of its log ratio to the
            candidates' median depth (where nothing metric is observed a candidate's scale is its own).
    Returns:
        [N,H,W]; 0.1 means about 10 %; 0 for one candidate; NaN where no candidate is valid.
    Raises:
        ValueError: depth is not [L,N,H,W] with L >= 1.
    """
    if depth.ndim != 4 or depth.shape[0] < 1:
        raise ValueError(f"depth: expected [L,N,H,W] with L >= 1, got {list(depth.shape)}")
    valid = depth.isfinite() & (depth > 0)
    log_depth = torch.where(valid, depth, torch.nan).log()
    if align:
        ratio = (log_depth - log_depth.nanmedian(dim=0).values).flatten(1)
        offset = ratio.nanmedian(dim=1).values
        log_depth = log_depth - torch.where(offset.isfinite(), offset, 0)[:, None, None, None]
    deviation = log_depth - log_depth.nanmean(dim=0)
    return deviation.square().nanmean(dim=0).sqrt()


def rgb_spread(rgb: Tensor) -> Tensor:
    """[L,N,3,H,W] -> [N,H,W]: standard deviation over candidates, root mean square over the colours; 0 for one."""
    if rgb.ndim != 5 or rgb.shape[0] < 1:
        raise ValueError(f"rgb: expected [L,N,3,H,W] with L >= 1, got {list(rgb.shape)}")
    return rgb.var(dim=0, correction=0).mean(dim=1).sqrt()


def candidate_seeds(seed: int, count: int, *, first: int = 0) -> list[int]:
    """Seeds of candidates first .. first + count - 1: candidate k's depends on (seed, k) alone.

    Raises:
        ValueError: a negative seed, first or count.
    """
    for name, value in (("seed", seed), ("count", count), ("first", first)):
        if value < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    return [int(np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0]) for k in range(first, first + count)]


def draw_candidate_noise(
    seed: int,
    count: int,
    shape: Sequence[int],
    *,
    first: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noise of `count` candidates, the same for candidate k whatever the batches they are drawn in.

    Args:
        seed: of the search.
        shape: (4,16,F,h,w) of one clip.
        first: number of the first candidate.
        device: of the result. The draw is made on the CPU, so every device gets the same numbers.
    Returns:
        [count,4,16,F,h,w], from `draw_noise`.
    """
    generators = [torch.Generator().manual_seed(s) for s in candidate_seeds(seed, count, first=first)]
    return draw_noise((count, *shape), generators, device=device, dtype=dtype)
