"""Umeyama's laws: it recovers a similarity exactly, and no other similarity does better."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from u4d.errors import UserError
from u4d.geometry.alignment import nearest_rotation, umeyama


def random_points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_rotation(seed: int) -> Tensor:
    return torch.from_numpy(Rotation.random(random_state=seed).as_matrix())


def residual(source: Tensor, target: Tensor, scale: Tensor, rotation: Tensor, translation: Tensor) -> float:
    return float((scale * source @ rotation.mT + translation - target).square().sum())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.integers(3, 40))
def test_a_random_similarity_is_recovered(seed: int, factor: float, count: int) -> None:
    source, turn, shift = random_points(count, seed), random_rotation(seed), 10 * random_points(1, seed + 1)[0]
    scale, rotation, translation = umeyama(source, factor * source @ turn.mT + shift)
    assert float(scale) == pytest.approx(factor, rel=1e-9)
    torch.testing.assert_close(rotation, turn, atol=1e-8, rtol=0)
    torch.testing.assert_close(translation, shift, atol=1e-8 * max(factor, 1), rtol=1e-9)


def test_without_scale_the_motion_is_rigid() -> None:
    source, turn = random_points(9, 0), random_rotation(1)
    scale, rotation, _ = umeyama(source, 3 * source @ turn.mT, with_scale=False)
    assert float(scale) == 1.0
    torch.testing.assert_close(rotation, turn)


def test_nothing_near_the_answer_is_better() -> None:
    source, target = random_points(12, 0), random_points(12, 1)
    scale, rotation, translation = umeyama(source, target)
    best = residual(source, target, scale, rotation, translation)
    for seed in range(30):
        nudge = torch.from_numpy(Rotation.from_rotvec(0.01 * random_points(1, seed)[0].numpy()).as_matrix())
        shift = 0.01 * random_points(1, seed + 99)[0]
        assert residual(source, target, scale * 1.01, rotation, translation) > best
        assert residual(source, target, scale, nudge @ rotation, translation) > best
        assert residual(source, target, scale, rotation, translation + shift) > best


def test_a_mirrored_target_still_gets_a_proper_rotation() -> None:
    source = random_points(20, 0)
    _, rotation, _ = umeyama(source, source * torch.tensor([1.0, 1.0, -1.0]))
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0)


def test_points_on_a_line_and_single_points_have_finite_answers() -> None:
    line = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    target = 5 * line @ random_rotation(0).mT + 1
    scale, rotation, translation = umeyama(line, target)
    assert residual(line, target, scale, rotation, translation) < 1e-20
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0)
    still = torch.full((8, 3), 0.1, dtype=torch.float64)
    scale, rotation, translation = umeyama(still, target)
    assert float(scale) == 1.0
    torch.testing.assert_close(rotation @ still[0] + translation, target.mean(0))


def test_batches_are_solved_one_by_one() -> None:
    source, target = random_points(24, 0).view(2, 2, 6, 3), random_points(24, 1).view(2, 2, 6, 3)
    together = umeyama(source, target)
    alone = umeyama(source[1, 0], target[1, 0])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1, 0], b)


def test_bad_points_are_refused() -> None:
    points = random_points(4, 0)
    with pytest.raises(UserError, match="same shape"):
        umeyama(points, points[:3])
    with pytest.raises(UserError, match="P >= 1"):
        umeyama(points[:0], points[:0])
    with pytest.raises(UserError, match="NaN"):
        umeyama(points, points * torch.nan)


def test_nearest_rotation_is_a_projection() -> None:
    turn = random_rotation(4)
    torch.testing.assert_close(nearest_rotation(0.3 * turn), turn)
    noisy = torch.eye(3, dtype=torch.float64) + 0.1 * random_points(3, 0)
    projected = nearest_rotation(noisy)
    torch.testing.assert_close(projected @ projected.mT, torch.eye(3, dtype=torch.float64))
    nearest = (noisy - projected).norm()
    assert all((noisy - random_rotation(seed)).norm() > nearest for seed in range(50))
