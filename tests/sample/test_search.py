"""Test-time search: anchors, scores, the choice, the spread and the candidates' noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from u4d.sample.search import (
    CandidateScores,
    anchor_frames,
    anchor_pairs,
    candidate_seeds,
    candidate_spread,
    choose_candidate,
    draw_candidate_noise,
    rgb_spread,
    score_candidates,
)

SHAPE = (4, 16, 3, 4, 5)


def test_anchors_are_evenly_spaced_with_both_ends() -> None:
    assert anchor_frames(50).tolist() == [0, 7, 14, 21, 28, 35, 42, 49]
    assert anchor_frames(5).tolist() == [0, 1, 2, 3, 4]
    assert anchor_frames(18, 2).tolist() == [0, 17]
    assert anchor_frames(1).tolist() == [0]


def test_pairs_are_all_ordered_pairs_once() -> None:
    pairs = anchor_pairs(50)
    assert pairs.shape == (56, 2) and len({tuple(pair) for pair in pairs.tolist()}) == 56
    assert bool((pairs[:, 0] != pairs[:, 1]).all()) and set(pairs.flatten().tolist()) == set(anchor_frames(50).tolist())
    assert anchor_pairs(2).tolist() == [[0, 1], [1, 0]] and anchor_pairs(1).shape == (0, 2)


def wall_seen_from_a_moving_camera(frames: int = 6, height: int = 48, width: int = 64) -> dict[str, Tensor]:
    """A textured wall at depth 2, seen by a camera that slides along it: every pixel is known in closed form."""
    focal, distance, travel = 60.0, 2.0, 0.4
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]).expand(1, frames, 3, 3)
    cam_to_world = torch.eye(4).repeat(1, frames, 1, 1)
    cam_to_world[0, :, 0, 3] = torch.linspace(0, travel, frames)
    u, v = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
    x = (u - width / 2) / focal * distance + cam_to_world[0, :, 0, 3, None, None]
    y = ((v - height / 2) / focal * distance).expand_as(x)
    colours = [torch.sin(7 * x + 2 * y), torch.cos(5 * y - 3 * x), torch.sin(4 * x) * torch.cos(6 * y)]
    rgb = (0.5 + 0.5 * torch.stack(colours, dim=1))[None]
    return {
        "rgb": rgb,
        "depth": torch.full((1, frames, height, width), distance),
        "intrinsics": intrinsics.contiguous(),
        "cam_to_world": cam_to_world,
    }


def test_the_candidate_with_the_true_geometry_wins() -> None:
    truth = wall_seen_from_a_moving_camera()
    names = ("true", "depth 0.9", "depth 1.1", "static camera", "path reversed")
    candidates = {key: value.repeat(len(names), *[1] * (value.ndim - 1)) for key, value in truth.items()}
    candidates["depth"][1] *= 0.9
    candidates["depth"][2] *= 1.1
    candidates["cam_to_world"][3] = torch.eye(4)
    candidates["cam_to_world"][4] = candidates["cam_to_world"][4].flip(0)
    scores = score_candidates(**candidates, anchors=4)
    assert scores.pair_error.shape == scores.overlap.shape == (5, 12) and scores.pairs.shape == (12, 2)
    assert names[choose_candidate(scores).best] == "true"
    assert float(scores.error[0]) < 0.01 < 0.02 < float(scores.error[1:].min())
    torch.testing.assert_close(scores.error, scores.pair_error.mean(-1), atol=1e-5, rtol=1e-4)


def test_a_candidate_that_looks_away_does_not_win() -> None:
    """With the last camera turned by 180 degrees nothing overlaps: that counts as the largest error there is."""
    truth = wall_seen_from_a_moving_camera()
    candidates = {key: value.repeat(3, *[1] * (value.ndim - 1)) for key, value in truth.items()}
    candidates["depth"][0] *= 1.05
    candidates["cam_to_world"][1, -1, :3, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    candidates["depth"][2] *= 1.15
    scores = score_candidates(**candidates, anchors=2)
    assert float(scores.error[1]) == 1 and not scores.overlap[1].any()
    assert choose_candidate(scores).best == 0


def test_a_single_frame_has_nothing_to_compare() -> None:
    truth = wall_seen_from_a_moving_camera(frames=1)
    scores = score_candidates(**truth)
    assert scores.error.tolist() == [0] and scores.pair_error.shape == (1, 0)
    assert choose_candidate(scores).best == 0


def scores_of(pair_error: list[list[float]], overlap: list[list[float]]) -> CandidateScores:
    errors = torch.tensor(pair_error)
    pairs = torch.zeros(errors.shape[1], 2, dtype=torch.int64)
    return CandidateScores(error=errors.mean(-1), pair_error=errors, overlap=torch.tensor(overlap), pairs=pairs)


def test_with_plenty_of_overlap_the_rule_is_the_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(16, 56, generator=generator)
    scores = scores_of(errors.tolist(), (0.7 + 0.3 * torch.rand(16, 56, generator=generator)).tolist())
    choice = choose_candidate(scores)
    assert torch.equal(choice.order, scores.error.argsort())
    torch.testing.assert_close(choice.error, scores.error.double())


def test_a_pair_of_little_overlap_counts_as_the_worst_of_the_others() -> None:
    scores = scores_of([[0.5, 0.25], [0.25, 0.0], [0.5, 0.5]], [[0.9, 0.8], [0.9, 0.02], [0.9, 0.9]])
    choice = choose_candidate(scores)
    torch.testing.assert_close(choice.error, torch.tensor([0.375, 0.375, 0.5], dtype=torch.float64))
    assert choice.order.tolist() == [0, 1, 2]  # equal: the earlier one
    assert choose_candidate(scores, min_overlap=0, min_relative_overlap=0).best == 1


def test_little_overlap_is_also_judged_against_the_other_candidates() -> None:
    scores = scores_of([[0.2], [0.1], [0.3]], [[0.9], [0.4], [0.95]])
    assert choose_candidate(scores).best == 0
    assert choose_candidate(scores, min_relative_overlap=0.4).best == 1


def test_pairs_that_nobody_covers_count_for_nobody() -> None:
    scores = scores_of([[0.2, 0.0], [0.1, 0.9]], [[0.9, 0.0], [0.9, 0.05]])
    torch.testing.assert_close(choose_candidate(scores).error, torch.tensor([0.2, 0.1], dtype=torch.float64))
    nobody = scores_of([[0.2], [0.1]], [[0.0], [0.0]])
    assert choose_candidate(nobody).best == 1


def test_candidates_that_are_not_finite_come_last() -> None:
    scores = scores_of([[math.nan, 0.0], [0.5, 0.6]], [[0.9, 0.9], [0.9, 0.9]])
    assert choose_candidate(scores).order.tolist() == [1, 0]


def test_depth_spread_is_relative_and_blind_to_a_candidates_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    surface = 1 + 4 * torch.rand(1, 3, 8, 10, generator=generator)
    scales = torch.tensor([1.0, 0.5, 3.0, 1.2])[:, None, None, None]
    assert float(candidate_spread(surface * scales).max()) < 1e-6
    assert float(candidate_spread(surface * scales, align=False).min()) > 0.5
    noisy = surface * (0.1 * torch.randn(400, 3, 8, 10, generator=generator)).exp()
    spread = candidate_spread(noisy)
    assert spread.shape == (3, 8, 10)
    torch.testing.assert_close(spread, torch.full_like(spread, 0.1), atol=0.02, rtol=0)
    assert not candidate_spread(surface).any()  # one candidate


def test_depth_spread_leaves_invalid_pixels_out() -> None:
    depth = torch.full((3, 1, 2, 2), 2.0)
    depth[0, 0, 0, 0], depth[1, 0, 0, 1] = 0, math.inf
    depth[:, 0, 1, 1] = 0
    spread = candidate_spread(depth)[0]
    assert spread[0].tolist() == [0, 0] and spread[1, 0] == 0 and math.isnan(float(spread[1, 1]))


def test_rgb_spread() -> None:
    images = torch.zeros(2, 1, 3, 2, 2)
    images[1] = 0.5
    torch.testing.assert_close(rgb_spread(images), torch.full((1, 2, 2), 0.25))
    assert not rgb_spread(images[:1]).any()


def test_a_candidates_noise_does_not_depend_on_the_batches() -> None:
    whole = draw_candidate_noise(7, 6, SHAPE)
    parts = torch.cat([draw_candidate_noise(7, 4, SHAPE), draw_candidate_noise(7, 2, SHAPE, first=4)])
    assert torch.equal(whole, parts) and whole.shape == (6, *SHAPE)
    flat = whole.flatten(1)
    assert float((torch.corrcoef(flat) - torch.eye(6)).abs().max()) < 0.1  # different candidates share nothing
    assert not torch.equal(draw_candidate_noise(8, 1, SHAPE), whole[:1])


def test_seeds_are_all_different_and_bad_ones_are_named() -> None:
    seeds = [seed for search in range(20) for seed in candidate_seeds(search, 50)]
    assert len(set(seeds)) == 1000
    with pytest.raises(ValueError, match="seed: expected a number >= 0, got -1"):
        candidate_seeds(-1, 2)
