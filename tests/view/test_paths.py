"""Laying one camera path over another, and the pictures held in front of cameras."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from example_scenes import wall_and_floor
from u4d.view.paths import align_path, frustum_corners, path_spread
from u4d.view.splat import choose_viewpoint, splat


def rotation(axis: int, angle: float) -> torch.Tensor:
    i, j = [k for k in range(3) if k != axis]
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def moved(poses: torch.Tensor, scale: float) -> torch.Tensor:
    turn = rotation(0, 0.7) @ rotation(1, -1.9)
    result = poses.double().clone()
    result[:, :3, :3] = turn @ poses[:, :3, :3].double()
    result[:, :3, 3] = scale * poses[:, :3, 3].double() @ turn.T + torch.tensor([3.0, -8.0, 1.0])
    return result


def straight(count: int = 6) -> torch.Tensor:
    poses = torch.eye(4).repeat(count, 1, 1)
    poses[:, 2, 3] = torch.arange(count) * 0.3
    return poses


@pytest.mark.parametrize("kind", ["curved", "straight"])
def test_a_moved_path_is_laid_back_exactly(kind: str) -> None:
    """Also a straight one, whose centres alone do not tell the turn about it."""
    path = wall_and_floor(frames=7).cam_to_world if kind == "curved" else straight()
    aligned, scale = align_path(moved(path, 4.0), path)
    torch.testing.assert_close(aligned, path.double(), atol=1e-5, rtol=0)
    assert scale == pytest.approx(0.25, abs=1e-5)


def test_still_paths_and_single_cameras_are_turned_and_not_scaled() -> None:
    for count in (1, 5):
        path = torch.eye(4).repeat(count, 1, 1)
        aligned, scale = align_path(moved(path, 9.0), path)
        torch.testing.assert_close(aligned, path.double(), atol=1e-9, rtol=0)
        assert scale == 1.0


def test_alignment_survives_a_result_that_does_not_move() -> None:
    aligned, scale = align_path(torch.eye(4).repeat(6, 1, 1), straight())
    assert bool(torch.isfinite(aligned).all()) and scale == 1.0


def test_path_spread_is_the_rms_distance_from_the_middle() -> None:
    assert path_spread(straight(2)) == pytest.approx(0.15)
    assert path_spread(straight(1)) == 0.0


def test_frustum_corners_project_onto_the_image_corners() -> None:
    scene = wall_and_floor(frames=3)
    corners = frustum_corners(scene.intrinsics, scene.cam_to_world, (24, 32), reach=2.0)
    inverse = torch.linalg.inv(scene.cam_to_world.double())
    local = corners @ inverse[:, :3, :3].mT + inverse[:, None, :3, 3]
    torch.testing.assert_close(local[..., 2], torch.full((3, 4), 2.0, dtype=torch.float64), atol=1e-5, rtol=0)
    pixels = local @ scene.intrinsics.double().mT / 2
    expected = torch.tensor([[0, 0], [32, 0], [32, 24], [0, 24]], dtype=torch.float64)
    torch.testing.assert_close(pixels[..., :2], expected.expand(3, 4, 2), atol=1e-4, rtol=0)


def test_the_viewpoint_shows_what_it_must() -> None:
    generator = torch.Generator().manual_seed(0)
    points = (
        torch.randn(2000, 3, generator=generator) * torch.tensor([2.0, 1.0, 3.0]) + torch.tensor([0, 0, 6])
    ).numpy()
    cameras = torch.tensor([[0.0, 0, 0], [1.0, -0.5, -2.0]]).numpy()
    view = choose_viewpoint(points, cameras, (300, 400))
    for part, share in ((cameras, 1.0), (points, 0.9)):
        pixels, depth = view.project(part)
        inside = (depth > 0) & (pixels >= 0).all(1) & (pixels[:, 0] <= 400) & (pixels[:, 1] <= 300)
        assert inside.mean() >= share
    behind = (view.project(cameras)[1] < view.project(points.mean(0))[1]).all()
    assert behind, "the cameras are nearer to the eye than the scene"


def test_nearer_points_cover_farther_ones() -> None:
    points = torch.tensor([[0.0, 0, 4], [0, 0, 5], [1, 0, 4], [-1, 0.5, 5]]).numpy()
    view = choose_viewpoint(points, points, (80, 120))
    eye = view.pivot - view.distance * view.rotation[2]
    pair = np.stack([points[0] + 0.2 * (eye - points[0]), points[0]])
    colours = torch.tensor([[255, 0, 0], [0, 0, 255]], dtype=torch.uint8).numpy()
    for order in ([0, 1], [1, 0]):
        picture = splat(pair[order], colours[order], view)
        reds = (picture == [255, 0, 0]).all(-1).sum()
        assert picture.shape == (80, 120, 3) and reds == 9
