"""What training watches is what `u4d.evaluate` measures, clip by clip."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from u4d.evaluate import pose_metrics as pose
from u4d.evaluate.depth_metrics import depth_metrics
from u4d.geometry.depth import clip_scale
from u4d.train.watch.scores import (
    COMPONENTS,
    correlations,
    depth_errors,
    direction_errors_deg,
    motion_components,
    turn_errors_deg,
)


def random_paths(clips: int, frames: int, seed: int) -> Tensor:
    """Camera paths [B,N,4,4] that wander and turn, in world frames of their own."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(clips, frames, 3, 3, generator=generator, dtype=torch.float64)
    paths = torch.eye(4, dtype=torch.float64).repeat(clips, frames, 1, 1)
    paths[..., :3, :3] = torch.linalg.matrix_exp(0.3 * (skew - skew.mT))
    steps = torch.randn(clips, frames, 3, generator=generator, dtype=torch.float64)
    paths[..., :3, 3] = steps.cumsum(1) + 5
    return paths


def random_depth(clips: int, seed: int) -> Tensor:
    """Depth [B,3,8,10], some of it invalid."""
    depth = 1 + 3 * torch.rand(clips, 3, 8, 10, generator=torch.Generator().manual_seed(seed))
    depth[:, 0, 0, :4] = torch.tensor([0.0, math.nan, math.inf, -1.0])
    return depth


def test_depth_errors_are_those_of_evaluation() -> None:
    truth, prediction = random_depth(4, 0), random_depth(4, 1).nan_to_num(2.0, posinf=2.0).clamp_min(0.5)
    expected = [depth_metrics(p, t) for p, t in zip(prediction, truth, strict=True)]
    abs_rel, delta = depth_errors(prediction, truth)
    assert abs_rel.tolist() == pytest.approx([each["abs_rel"] for each in expected])
    assert delta.tolist() == pytest.approx([each["delta_1_25"] for each in expected])
    assert 0.1 < float(delta.mean()) < 0.9


def test_depth_errors_do_not_see_the_scale() -> None:
    truth = random_depth(2, 0)
    abs_rel, delta = depth_errors(truth.nan_to_num(1.0, posinf=1.0) * 7, truth)
    assert abs_rel.tolist() == pytest.approx([0, 0], abs=1e-6) and delta.tolist() == [1, 1]


def test_a_prediction_that_is_not_a_number_is_not_hidden() -> None:
    truth = random_depth(2, 0)
    abs_rel, _ = depth_errors(torch.full_like(truth, math.nan), truth)
    assert bool(abs_rel.isnan().all())


def test_pose_errors_are_those_of_evaluation() -> None:
    truth, prediction = random_paths(5, 9, 0), random_paths(5, 9, 1)
    prediction[4, :, :3, 3] = prediction[4, :1, :3, 3]  # stands still: chance
    expected = [pose.pose_metrics(p, t, min_motion=0.5) for p, t in zip(prediction, truth, strict=True)]
    direction = direction_errors_deg(prediction, truth, torch.full((5,), 0.5))
    assert direction.tolist() == pytest.approx([each["translation_direction_deg"] for each in expected])
    assert float(direction[4]) == 90
    turn = turn_errors_deg(prediction, truth)
    assert turn.tolist() == pytest.approx([each["rotation_first_to_last_deg"] for each in expected])


def test_a_camera_that_stands_still_has_no_direction() -> None:
    truth = torch.eye(4).repeat(1, 5, 1, 1)
    assert bool(direction_errors_deg(random_paths(1, 5, 0), truth, torch.tensor([1e-6])).isnan().all())


def test_motion_and_its_correlations_are_those_of_evaluation() -> None:
    truth, noise, scale = random_paths(8, 4, 0), random_paths(8, 4, 1), torch.linspace(0.5, 2, 8)
    prediction = truth.clone()
    prediction[:4] = noise[:4]
    p, t = motion_components(prediction, scale), motion_components(truth, scale)
    expected_p, expected_t = (
        [pose.motion_components(path, float(unit)) for path, unit in zip(paths, scale, strict=True)]
        for paths in (prediction, truth)
    )
    torch.testing.assert_close(p, torch.stack(expected_p))
    torch.testing.assert_close(t, torch.stack(expected_t))
    assert COMPONENTS == pose.COMPONENTS
    assert correlations(p, t) == pytest.approx(pose.component_correlations(expected_p, expected_t))
    assert correlations(t, t) == pytest.approx(dict.fromkeys(COMPONENTS, 1.0))


def test_a_constant_correlates_with_nothing() -> None:
    motion = motion_components(random_paths(6, 3, 0), torch.ones(6))
    assert all(math.isnan(r) for r in correlations(torch.zeros_like(motion), motion).values())
    assert all(math.isnan(r) for r in correlations(motion[:2], motion[:2]).values())


def test_scale_is_the_median_depth() -> None:
    """`validate` divides by the scale that evaluation divides by."""
    from u4d.train.watch.validate import scales

    depth = random_depth(3, 2)
    assert scales(depth).tolist() == [clip_scale(clip) for clip in depth]
