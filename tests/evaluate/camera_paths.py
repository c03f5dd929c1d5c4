"""Camera paths for the tests of this folder, and the reading of TUM files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from u4d.geometry.cameras import quat_xyzw_to_rotation


def poses(rotation: np.ndarray, centres: np.ndarray) -> Tensor:
    """[N, 4, 4] float64 from rotations [N, 3, 3] and centres [N, 3]."""
    matrices = np.tile(np.eye(4), (len(centres), 1, 1))
    matrices[:, :3, :3] = rotation
    matrices[:, :3, 3] = centres
    return torch.from_numpy(matrices)


def random_walk(num_frames: int, seed: int) -> Tensor:
    """A path that turns and moves a little from frame to frame, in a world frame of its own."""
    rng = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(0.1 * rng.standard_normal((num_frames, 3)))
    rotation = [Rotation.random(random_state=seed)]
    for turn in turns[1:]:
        rotation.append(rotation[-1] * turn)
    centres = np.cumsum(rng.standard_normal((num_frames, 3)), 0) + 20
    return poses(np.stack([r.as_matrix() for r in rotation]), centres)


def similar(path: Tensor, seed: int, scale: float) -> Tensor:
    """The same path in another world frame and another unit."""
    rng = np.random.default_rng(seed)
    world = torch.from_numpy(Rotation.random(random_state=seed).as_matrix())
    moved = path.clone()
    moved[:, :3, :3] = world @ path[:, :3, :3]
    moved[:, :3, 3] = scale * path[:, :3, 3] @ world.mT + torch.from_numpy(rng.standard_normal(3))
    return moved


def read_tum(path: Path) -> tuple[np.ndarray, Tensor]:
    """Times [N] and poses [N, 4, 4] of a TUM trajectory file."""
    rows = np.loadtxt(path)
    matrices = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    matrices[:, :3, :3] = quat_xyzw_to_rotation(torch.from_numpy(rows[:, 4:8]))
    matrices[:, :3, 3] = torch.from_numpy(rows[:, 1:4])
    return rows[:, 0], matrices


def matched(truth_times: np.ndarray, times: np.ndarray, max_difference: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Indices into both lists: for each time of the shorter one the nearest of the other, if it is close enough."""
    swap = len(times) > len(truth_times)
    short, long = (truth_times, times) if swap else (times, truth_times)
    nearest = np.array([np.abs(long - time).argmin() for time in short])
    close = np.abs(long[nearest] - short) <= max_difference
    first, second = nearest[close], np.flatnonzero(close)
    return (second, first) if swap else (first, second)
