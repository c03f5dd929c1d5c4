"""Smoothing of camera paths in time."""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_path(cam_to_world: Tensor, deviation_frames: float) -> Tensor:
    """Local linear regression over time with Gaussian weights (Loader 1999, section 2.1).

    Each camera becomes the value, at its frame, of the line that fits its neighbours best, so a camera that moves
    straight and evenly stays where it is, also at both ends. Rotations are averaged as matrices (with the weights of
    that regression) and projected onto the nearest rotation.

    Args:
        cam_to_world: `[...,N,4,4]`, rigid.
        deviation_frames: standard deviation of the weights; 0 changes nothing.
    Returns:
        like cam_to_world.
    """
    if deviation_frames == 0:
        return cam_to_world
    path = cam_to_world.double()
    weights = regression_weights(path.shape[-3], deviation_frames).to(path.device)
    averaged = torch.einsum("ij,...jab->...iab", weights, path)
    left, _, right = torch.linalg.svd(averaged[..., :3, :3])
    flipped = torch.ones_like(averaged[..., 0, :3])
    flipped[..., 2] = torch.linalg.det(left @ right)
    smooth = path.clone()
    smooth[..., :3, :3] = left @ (flipped[..., None] * right)
    smooth[..., :3, 3] = averaged[..., :3, 3]
    return smooth.to(cam_to_world)


def regression_weights(frames: int, deviation_frames: float) -> Tensor:
    """`[N,N]` float64: row i gives the value at i of the weighted line through all frames. Rows add up to 1."""
    time = torch.arange(frames, dtype=torch.float64)
    if frames == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    rows = []
    for frame in range(frames):
        near = torch.exp(-0.5 * ((time - frame) / deviation_frames).square())
        line = torch.stack([torch.ones_like(time), time - frame], dim=1)
        rows.append(torch.linalg.solve(line.mT @ (near[:, None] * line), line.mT * near)[0])
    return torch.stack(rows)
