"""Rotation matrices from angles, batched, in OpenCV axes (x right, y down, z forward)."""

from __future__ import annotations

import torch
from torch import Tensor


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def yaw_matrix(yaw: Tensor) -> Tensor:
    """Turn to the right by `yaw` (rad): [...] -> [...,3,3]."""
    cos, sin, one, zero = yaw.cos(), yaw.sin(), torch.ones_like(yaw), torch.zeros_like(yaw)
    return _matrix([[cos, zero, sin], [zero, one, zero], [-sin, zero, cos]])


def pitch_matrix(pitch: Tensor) -> Tensor:
    """Look up by `pitch` (rad): [...] -> [...,3,3]."""
    cos, sin, one, zero = pitch.cos(), pitch.sin(), torch.ones_like(pitch), torch.zeros_like(pitch)
    return _matrix([[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]])


def roll_matrix(roll: Tensor) -> Tensor:
    """Turn about the optical axis by `roll` (rad): [...] -> [...,3,3]."""
    cos, sin, one, zero = roll.cos(), roll.sin(), torch.ones_like(roll), torch.zeros_like(roll)
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])


def axis_angle_matrix(axis: Tensor, angle: Tensor) -> Tensor:
    """Rodrigues' formula: unit axis [...,3], angle (rad) of the same leading shape [...] -> [...,3,3]."""
    x, y, z = axis.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    rest = 1.0 - cos
    return _matrix(
        [
            [cos + x * x * rest, x * y * rest - z * sin, x * z * rest + y * sin],
            [y * x * rest + z * sin, cos + y * y * rest, y * z * rest - x * sin],
            [z * x * rest - y * sin, z * y * rest + x * sin, cos + z * z * rest],
        ]
    )
