"""Cameras as matrices: checks, inverses, and the small conversions that everything else relies on.

Conventions (spec, section 1): OpenCV axes (x right, y down, z forward), `cam_to_world` is [..., 4, 4], `intrinsics` is
[..., 3, 3] in pixels, and the first pixel has its centre at (0.5, 0.5). So resizing an image scales fx, cx by the
width's ratio and fy, cy by the height's, with no offset.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from u4d.errors import UserError

ORTHONORMAL_TOLERANCE = 1e-3


def check_rigid(cam_to_world: Tensor, name: str = "cam_to_world") -> None:
    """Raise unless every matrix is a rigid motion.

    Args:
        cam_to_world: [..., 4, 4]; the last leading dimension counts frames.
        name: the argument's name, for the message.
    Raises:
        UserError: wrong shape or dtype, or a frame (the first bad one is named) that is not finite, whose rotation is
            not orthonormal to 1e-3, that mirrors (determinant -1), or whose last row is not 0 0 0 1.
    """
    _check_matrices(cam_to_world, 4, name)
    _refuse_first(~torch.isfinite(cam_to_world).all(-1).all(-1), name, "finite numbers", "NaN or infinity")
    rotation = cam_to_world[..., :3, :3].double()
    identity = torch.eye(3, dtype=rotation.dtype, device=rotation.device)
    deviation = (rotation.mT @ rotation - identity).abs().amax((-2, -1))
    _refuse_first(
        deviation > ORTHONORMAL_TOLERANCE,
        name,
        f"a rotation that is orthonormal to {ORTHONORMAL_TOLERANCE:g}",
        "a scaled or sheared one",
    )
    mirrored = torch.linalg.det(rotation) < 0
    _refuse_first(mirrored, name, "a rotation with determinant +1", "a mirrored one (check the axis conventions)")
    last_row = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=cam_to_world.dtype, device=cam_to_world.device)
    wrong_row = (cam_to_world[..., 3, :] - last_row).abs().amax(-1) > 1e-6
    _refuse_first(wrong_row, name, "last row 0 0 0 1", "another one (is it transposed?)")


def check_intrinsics(intrinsics: Tensor, name: str = "intrinsics") -> None:
    """Raise unless every matrix is a pinhole camera's: finite, focal lengths > 0, lower triangle 0, last row 0 0 1.

    Args:
        intrinsics: [..., 3, 3], pixels; the last leading dimension counts frames.
        name: the argument's name, for the message.
    Raises:
        UserError: wrong shape or dtype, or a bad frame (the first one is named).
    """
    _check_matrices(intrinsics, 3, name)
    _refuse_first(~torch.isfinite(intrinsics).all(-1).all(-1), name, "finite numbers", "NaN or infinity")
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], -1)
    _refuse_first((focal <= 0).any(-1), name, "positive focal lengths fx, fy in pixels", "zero or negative ones")
    below = torch.stack([intrinsics[..., 1, 0], intrinsics[..., 2, 0], intrinsics[..., 2, 1]], -1)
    _refuse_first((below != 0).any(-1), name, "zeros below the diagonal", "others (is it transposed?)")
    corner_off = (intrinsics[..., 2, 2] - 1).abs() > 1e-6
    _refuse_first(corner_off, name, "last row 0 0 1", "another one (divide the matrix by its last element)")


def invert_rigid(transform: Tensor) -> Tensor:
    """Invert rigid motions, [..., 4, 4] -> [..., 4, 4], by transposing the rotation (no general inverse)."""
    rotation_t = transform[..., :3, :3].mT
    translation = -(rotation_t @ transform[..., :3, 3:])
    return torch.cat([torch.cat([rotation_t, translation], -1), transform[..., 3:, :]], -2)


def relative_to_first(cam_to_world: Tensor) -> Tensor:
    """Express a path in its first camera's frame, so that the first camera is exactly the identity.

    Args:
        cam_to_world: [..., N, 4, 4], N >= 1, rigid.
    Returns:
        [..., N, 4, 4] `inv(T_0) T_n`, same dtype. The product is taken in float64: centres may be far from the origin.
    """
    exact = cam_to_world.double()
    relative = (invert_rigid(exact[..., :1, :, :]) @ exact).to(cam_to_world.dtype)
    first = torch.eye(4, dtype=relative.dtype, device=relative.device).expand_as(relative[..., :1, :, :])
    return torch.cat([first, relative[..., 1:, :, :]], -3)


def resize_intrinsics(intrinsics: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Intrinsics [..., 3, 3] of an image resized from `from_size` to `to_size`, both (H, W); the ratio may change."""
    if min(*from_size, *to_size) <= 0:
        raise UserError(f"from_size, to_size: expected positive (H, W), got {from_size} and {to_size}")
    ratio = intrinsics.new_tensor([to_size[1] / from_size[1], to_size[0] / from_size[0], 1.0])
    return intrinsics * ratio[:, None]


def fov_to_intrinsics(fov_x_rad: Tensor | float, image_size: tuple[int, int]) -> Tensor:
    """Intrinsics with square pixels and the principal point in the middle.

    Args:
        fov_x_rad: [...] horizontal field of view, radians, in (0, pi).
        image_size: (H, W) in pixels.
    Returns:
        [..., 3, 3] intrinsics in pixels (float32 for a plain number).
    Raises:
        UserError: a field of view outside (0, pi).
    """
    fov = torch.as_tensor(fov_x_rad)
    fov = fov if fov.is_floating_point() else fov.float()
    if not bool(((fov > 0) & (fov < math.pi)).all()):
        raise UserError(f"fov_x_rad: expected radians between 0 and pi, got {fov.flatten()[:4].tolist()}")
    height, width = image_size
    focal = (width / 2) / torch.tan(fov / 2)
    zero, one = torch.zeros_like(focal), torch.ones_like(focal)
    rows = (focal, zero, one * (width / 2), zero, focal, one * (height / 2), zero, zero, one)
    return torch.stack(rows, -1).reshape(*focal.shape, 3, 3)


def rotation_to_quat_xyzw(rotation: Tensor) -> Tensor:
    """Unit quaternions (x, y, z, w), w >= 0, of rotations.

    Args:
        rotation: [..., 3, 3], orthonormal.
    Returns:
        [..., 4]. Of the four ways to read a quaternion off a matrix the one with the largest pivot is taken
        (Shepperd 1978), so no angle is special.
    """
    r = rotation
    xx, yy, zz = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
    squares = torch.stack([1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz, 1 + xx + yy + zz], -1)
    xy, xz, yz = r[..., 0, 1] + r[..., 1, 0], r[..., 0, 2] + r[..., 2, 0], r[..., 1, 2] + r[..., 2, 1]
    xw, yw, zw = r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]
    outer = torch.stack(  # four times q q^T: every row is the quaternion times one of its components
        [
            torch.stack([squares[..., 0], xy, xz, xw], -1),
            torch.stack([xy, squares[..., 1], yz, yw], -1),
            torch.stack([xz, yz, squares[..., 2], zw], -1),
            torch.stack([xw, yw, zw, squares[..., 3]], -1),
        ],
        -2,
    )
    pivot = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quat = torch.nn.functional.normalize(outer.gather(-2, pivot).squeeze(-2), dim=-1)
    return torch.where(quat[..., 3:] < 0, -quat, quat)


def quat_xyzw_to_rotation(quat_xyzw: Tensor) -> Tensor:
    """Rotations [..., 3, 3] of quaternions [..., 4] (x, y, z, w), which need not have unit length.

    Raises:
        UserError: a quaternion that is zero or not finite.
    """
    norm = torch.linalg.vector_norm(quat_xyzw, dim=-1, keepdim=True)
    if not bool((torch.isfinite(norm) & (norm > 1e-12)).all()):
        raise UserError("quat_xyzw: expected finite quaternions that are not zero, got one that is")
    x, y, z, w = (quat_xyzw / norm).unbind(-1)
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(rows, -1).reshape(*x.shape, 3, 3)


def rotation_angle_rad(rotation: Tensor) -> Tensor:
    """Angles [...] in [0, pi] of rotations [..., 3, 3].

    `atan2` of sine and cosine keeps small angles exact, where `acos` of the trace loses half the digits.
    """
    r = rotation
    axis = torch.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], -1)
    cosine = r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1
    return torch.atan2(torch.linalg.vector_norm(axis, dim=-1), cosine)


def _check_matrices(matrices: Tensor, size: int, name: str) -> None:
    if not isinstance(matrices, Tensor) or not matrices.is_floating_point():
        got = matrices.dtype if isinstance(matrices, Tensor) else type(matrices).__name__
        raise UserError(f"{name}: expected a floating-point torch tensor, got {got}")
    if matrices.ndim < 2 or matrices.shape[-2:] != (size, size):
        raise UserError(f"{name}: expected [..., {size}, {size}], got {list(matrices.shape)}")


def _refuse_first(bad: Tensor, name: str, wanted: str, got: str) -> None:
    """Raise, naming the first frame for which `bad` [...] holds."""
    if not bool(bad.any()):
        return
    index = [int(i) for i in bad.nonzero()[0]]
    frame = f" in frame {index[-1]}" if index else ""
    clip = f" of clip {', '.join(map(str, index[:-1]))}" if len(index) > 1 else ""
    raise UserError(f"{name}: expected {wanted}, got {got}{frame}{clip}")
