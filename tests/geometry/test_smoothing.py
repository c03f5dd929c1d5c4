"""Smoothing of camera paths, by its laws."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from u4d.geometry.smoothing import regression_weights, smooth_path


def turning_path(frames: int, deg_per_frame: float = 0.0, jitter: float = 0.0, seed: int = 0) -> Tensor:
    """Straight at constant speed, turning about y; `jitter` in radians and in units."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    turn = torch.deg2rad(torch.arange(frames, dtype=torch.float64) * deg_per_frame)
    vectors = torch.zeros(frames, 3, dtype=torch.float64)
    vectors[:, 1] = turn
    vectors += jitter * torch.randn(frames, 3, generator=generator, dtype=torch.float64)
    path[:, :3, :3] = torch.from_numpy(Rotation.from_rotvec(vectors.numpy()).as_matrix())
    path[:, :3, 3] = torch.arange(frames, dtype=torch.float64)[:, None] * torch.tensor([0.3, 0.0, 1.0])
    path[:, :3, 3] += jitter * torch.randn(frames, 3, generator=generator, dtype=torch.float64)
    return path


@pytest.mark.parametrize("frames", (1, 2, 3, 18))
@pytest.mark.parametrize("deviation", (0.5, 2.0, 30.0))
def test_an_even_straight_path_stays(frames: int, deviation: float) -> None:
    path = turning_path(frames)
    torch.testing.assert_close(smooth_path(path, deviation), path)


def test_an_even_turn_stays_nearly() -> None:
    path = turning_path(18, deg_per_frame=1.0)
    turn = smooth_path(path, 2.0)[:, :3, :3].mT @ path[:, :3, :3]
    assert Rotation.from_matrix(turn.numpy()).magnitude().max() < 1e-3  # of 0.3 radians in all


def test_jitter_shrinks_as_a_regression_says() -> None:
    """White noise is multiplied by the norm of the weights, exactly for centres and to first order for rotations."""
    frames, deviation, jitter = 24, 2.0, 0.01
    factor = regression_weights(frames, deviation).norm(dim=1)[frames // 2]
    centres, angles = [], []
    for seed in range(300):
        clean, noisy = turning_path(frames), turning_path(frames, jitter=jitter, seed=seed)
        off = smooth_path(noisy, deviation)[frames // 2] - clean[frames // 2]
        centres.append(off[:3, 3].square().mean())
        turn = Rotation.from_matrix(smooth_path(noisy, deviation)[frames // 2, :3, :3].numpy())
        angles.append(turn.magnitude() ** 2 / 3)
    for squares in (torch.stack(centres), torch.tensor(angles)):
        assert float(squares.mean().sqrt()) == pytest.approx(jitter * float(factor), rel=0.1)
    assert 0.3 < float(factor) < 0.4


def test_results_are_rigid_and_batches_are_paths_by_themselves() -> None:
    paths = torch.stack([turning_path(9, 2.0, 0.2, seed) for seed in range(4)]).float()
    smooth = smooth_path(paths, 1.5)
    assert smooth.dtype == torch.float32
    rotations = smooth[..., :3, :3].double()
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).double().expand_as(rotations), atol=1e-6, rtol=0)
    assert torch.linalg.det(rotations).min() > 0.999
    torch.testing.assert_close(smooth[2], smooth_path(paths[2], 1.5))
    assert torch.equal(smooth_path(paths, 0), paths)
