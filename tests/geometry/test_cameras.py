"""Laws of rigid motions and pinhole cameras, and the messages for matrices that are neither."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from u4d.errors import UserError
from u4d.geometry.cameras import (
    check_intrinsics,
    check_rigid,
    fov_to_intrinsics,
    invert_rigid,
    quat_xyzw_to_rotation,
    relative_to_first,
    resize_intrinsics,
    rotation_angle_rad,
    rotation_to_quat_xyzw,
)


def random_poses(*shape: int, seed: int = 0, extent: float = 10.0) -> Tensor:
    """[*shape, 4, 4] float64 poses with rotations from scipy, an implementation that is not ours."""
    generator = torch.Generator().manual_seed(seed)
    poses = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    rotation = Rotation.random(math.prod(shape), random_state=seed).as_matrix()
    poses[..., :3, :3] = torch.from_numpy(rotation).view(*shape, 3, 3)
    poses[..., :3, 3] = extent * torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    return poses


def test_inverse_undoes_the_motion() -> None:
    poses = random_poses(4, 7)
    identity = torch.eye(4, dtype=torch.float64).expand_as(poses)
    torch.testing.assert_close(invert_rigid(poses) @ poses, identity, atol=1e-12, rtol=0)
    torch.testing.assert_close(invert_rigid(poses), torch.linalg.inv(poses), atol=1e-12, rtol=0)


def test_relative_path_starts_at_identity_and_forgets_the_world_frame() -> None:
    path = random_poses(2, 6)
    relative = relative_to_first(path)
    assert torch.equal(relative[:, 0], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    moved = random_poses(2, 1, seed=5) @ path
    torch.testing.assert_close(relative_to_first(moved), relative, atol=1e-11, rtol=0)
    torch.testing.assert_close(path[:, :1] @ relative, path, atol=1e-11, rtol=0)


def test_relative_path_far_from_the_origin_keeps_float32_precision() -> None:
    path = random_poses(5).float()
    path[:, :3, 3] = (path[:, :3, 3] * 64).round() / 64
    far = path.clone()
    far[:, :3, 3] += 4096.0  # exact in float32, and so is the difference of two centres
    assert (relative_to_first(far) - relative_to_first(path)).abs().max() < 1e-5


def test_quaternions_agree_with_scipy_and_return() -> None:
    rotation = random_poses(500)[..., :3, :3]
    quat = rotation_to_quat_xyzw(rotation)
    truth = torch.from_numpy(Rotation.from_matrix(rotation.numpy()).as_quat(canonical=True))
    torch.testing.assert_close(quat, truth, atol=1e-12, rtol=0)
    torch.testing.assert_close(quat_xyzw_to_rotation(-3 * quat), rotation, atol=1e-12, rtol=0)


@pytest.mark.parametrize("axis", range(3))
def test_half_turns_are_no_special_case(axis: int) -> None:
    rotation = -torch.eye(3)
    rotation[axis, axis] = 1.0
    quat = rotation_to_quat_xyzw(rotation)
    assert quat.abs().tolist() == [float(i == axis) for i in range(4)]
    assert torch.equal(quat_xyzw_to_rotation(quat), rotation)


@settings(deadline=None, max_examples=60)
@given(st.floats(0, math.pi), st.integers(0, 10**6))
def test_rotation_angle_is_exact_at_every_size(angle: float, seed: int) -> None:
    axis = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axis = axis / axis.norm()
    rotation = torch.from_numpy(Rotation.from_rotvec((angle * axis).numpy()).as_matrix())
    # Near pi the sine passes through zero with the rounding of nine entries; elsewhere the angle is exact.
    assert float(rotation_angle_rad(rotation)) == pytest.approx(angle, abs=1e-7 if angle > 3.1 else 1e-14)


def test_small_angles_survive_float32() -> None:
    rotation = torch.eye(3)
    rotation[0, 1], rotation[1, 0] = -1e-5, 1e-5
    assert float(rotation_angle_rad(rotation)) == pytest.approx(1e-5, rel=1e-5)  # acos of the trace gives 0


def test_field_of_view_is_where_the_edge_is_seen() -> None:
    fov = torch.tensor([0.4, 1.0, 2.0])
    intrinsics = fov_to_intrinsics(fov, (240, 320))
    check_intrinsics(intrinsics)
    right_edge = torch.linalg.solve(intrinsics, torch.tensor([320.0, 120.0, 1.0]).expand(3, 3))
    torch.testing.assert_close(2 * torch.atan2(right_edge[:, 0], right_edge[:, 2]), fov)
    assert right_edge[:, 1].abs().max() < 1e-6
    assert fov_to_intrinsics(1.0, (240, 320)).shape == (3, 3)


def test_resized_intrinsics_see_the_same_ray_at_the_same_place() -> None:
    intrinsics = torch.tensor([[500.0, 3.0, 310.0], [0.0, 480.0, 250.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    resized = resize_intrinsics(intrinsics, (480, 640), (96, 256))
    pixel = torch.tensor([100.5, 200.5, 1.0], dtype=torch.float64)
    moved = pixel * torch.tensor([256 / 640, 96 / 480, 1.0], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.solve(resized, moved), torch.linalg.solve(intrinsics, pixel))
    torch.testing.assert_close(resize_intrinsics(resized, (96, 256), (480, 640)), intrinsics)


def bad_pose(kind: str) -> Tensor:
    pose = torch.eye(4)
    if kind == "nan":
        pose[0, 3] = torch.nan
    elif kind == "scaled":
        pose[:3, :3] *= 1.01
    elif kind == "mirrored":
        pose[2, 2] = -1
    elif kind == "transposed":
        pose[3, 0] = 0.5
    return pose


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "NaN or infinity"),
        ("scaled", "orthonormal"),
        ("mirrored", r"determinant \+1"),
        ("transposed", "last row 0 0 0 1"),
    ],
)
def test_the_first_frame_that_is_not_rigid_is_named(kind: str, words: str) -> None:
    poses = random_poses(6).float()
    check_rigid(poses)
    poses[3], poses[5] = bad_pose(kind), bad_pose(kind)
    with pytest.raises(UserError, match=f"^world_cameras: .*{words}.* in frame 3$"):
        check_rigid(poses, "world_cameras")
    with pytest.raises(UserError, match=r"in frame 3 of clip 1$"):
        check_rigid(torch.stack([random_poses(6).float(), poses]))


def test_rounding_is_not_a_fault() -> None:
    poses = random_poses(50, extent=100).float()
    poses[:, :3, :3] += 1e-4 * torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(0))
    check_rigid(poses)


@pytest.mark.parametrize(
    ("row", "column", "value", "words"),
    [
        (0, 0, torch.nan, "finite"),
        (0, 0, 0.0, "positive focal"),
        (1, 1, -500.0, "positive focal"),
        (2, 0, 320.0, "below the diagonal"),
        (1, 0, 1.0, "below the diagonal"),
        (2, 2, 0.0, "last row 0 0 1"),
    ],
)
def test_bad_intrinsics_are_named(row: int, column: int, value: float, words: str) -> None:
    intrinsics = fov_to_intrinsics(torch.full((4,), 1.0), (48, 64))
    check_intrinsics(intrinsics)
    intrinsics[2, row, column] = value
    with pytest.raises(UserError, match=f"{words}.* in frame 2$"):
        check_intrinsics(intrinsics)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"cam_to_world: expected \[..., 4, 4\], got"):
        check_rigid(torch.zeros(shape))


def test_integers_and_arrays_are_refused() -> None:
    with pytest.raises(UserError, match="floating-point"):
        check_rigid(torch.eye(4, dtype=torch.int64))


def test_conversions_refuse_what_has_no_answer() -> None:
    with pytest.raises(UserError, match="quat_xyzw"):
        quat_xyzw_to_rotation(torch.zeros(2, 4))
    with pytest.raises(UserError, match="fov_x_rad"):
        fov_to_intrinsics(math.pi, (48, 64))
    with pytest.raises(UserError, match="to_size"):
        resize_intrinsics(torch.eye(3), (48, 64), (0, 64))
