"""Unprojected points, seen again, are where they came from."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from u4d.errors import UserError
from u4d.geometry.cameras import fov_to_intrinsics, invert_rigid
from u4d.geometry.points import unproject


def clip() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    depth = torch.rand(2, 3, 5, 6, generator=generator) * 4 + 1
    intrinsics = fov_to_intrinsics(torch.rand(2, 3, generator=generator) + 0.5, (5, 6))
    intrinsics[..., 0, 2] += 0.7
    poses = torch.eye(4).repeat(2, 3, 1, 1)
    poses[..., :3, :3] = torch.from_numpy(Rotation.random(6, random_state=0).as_matrix()).float().view(2, 3, 3, 3)
    poses[..., :3, 3] = torch.randn(2, 3, 3, generator=generator)
    return depth, intrinsics, poses


def test_projecting_the_points_gives_pixel_centres_and_depth() -> None:
    depth, intrinsics, poses = clip()
    points = unproject(depth, intrinsics, poses)
    world = torch.cat([points.flatten(-2), torch.ones(2, 3, 1, 30)], -2)
    image = intrinsics @ (invert_rigid(poses) @ world)[..., :3, :]
    torch.testing.assert_close(image[..., 2, :].unflatten(-1, (5, 6)), depth, atol=1e-5, rtol=1e-5)
    pixel = (image[..., :2, :] / image[..., 2:, :]).unflatten(-1, (5, 6))
    assert pixel[..., 0, 2, 4].flatten().tolist() == pytest.approx([4.5] * 6, abs=1e-4)
    assert pixel[..., 1, 2, 4].flatten().tolist() == pytest.approx([2.5] * 6, abs=1e-4)


def test_the_optical_axis_is_z() -> None:
    intrinsics = fov_to_intrinsics(1.0, (3, 3)).expand(1, 1, 3, 3)
    points = unproject(torch.full((1, 1, 3, 3), 2.0), intrinsics, torch.eye(4).expand(1, 1, 4, 4))
    assert points[0, 0, :, 1, 1].tolist() == pytest.approx([0.0, 0.0, 2.0], abs=1e-6)
    assert points[0, 0, 0, 1, 2] > 0  # right of the middle is +x
    assert points[0, 0, 1, 2, 1] > 0  # below the middle is +y


def test_invalid_depth_gives_nan_there_and_only_there() -> None:
    depth, intrinsics, poses = clip()
    for x, bad in enumerate((0.0, -1.0, math.nan, math.inf)):
        depth[0, 1, 2, x] = bad
    missing = torch.isnan(unproject(depth, intrinsics, poses))
    assert missing[0, 1, :, 2, :4].all()
    assert int(missing.sum()) == 12


def test_shapes_and_matrices_are_checked() -> None:
    depth, intrinsics, poses = clip()
    with pytest.raises(UserError, match=r"intrinsics: expected \[2, 3, 3, 3\] .* got \[2, 2, 3, 3\]"):
        unproject(depth, intrinsics[:, :2], poses)
    with pytest.raises(UserError, match="depth: expected"):
        unproject(depth[0], intrinsics, poses)
    with pytest.raises(UserError, match="orthonormal"):
        unproject(depth, intrinsics, 2 * poses)
