"""Pixels to points of the world."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.geometry.cameras import check_intrinsics, check_rigid
from u4d.geometry.depth import valid_depth


def unproject(depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor) -> Tensor:
    """Lift every pixel to its world point.

    Args:
        depth: [B, N, H, W], metres along the optical axis; invalid pixels are 0 (or negative, NaN, infinite).
        intrinsics: [B, N, 3, 3], pixels; the first pixel's centre is (0.5, 0.5).
        cam_to_world: [B, N, 4, 4], OpenCV axes, metres.
    Returns:
        [B, N, 3, H, W] world points in metres, NaN where depth is invalid.
    Raises:
        UserError: shapes disagree, a rotation is not orthonormal to 1e-3, or intrinsics are no pinhole camera's.
    """
    if depth.ndim != 4:
        raise UserError(f"depth: expected [B, N, H, W], got {list(depth.shape)}")
    for name, matrices, size in (("intrinsics", intrinsics, 3), ("cam_to_world", cam_to_world, 4)):
        wanted = [*depth.shape[:2], size, size]
        if list(matrices.shape) != wanted:
            raise UserError(f"{name}: expected {wanted} to match depth {list(depth.shape)}, got {list(matrices.shape)}")
    check_intrinsics(intrinsics)
    check_rigid(cam_to_world)
    height, width = depth.shape[-2:]
    v = torch.arange(height, dtype=depth.dtype, device=depth.device) + 0.5
    u = torch.arange(width, dtype=depth.dtype, device=depth.device) + 0.5
    pixels = torch.stack([u.expand(height, width), v[:, None].expand(height, width), torch.ones_like(depth[0, 0])])
    # One 3x3 per frame turns pixels into world directions with unit length along the optical axis.
    to_world = (cam_to_world[..., :3, :3].double() @ torch.linalg.inv(intrinsics.double())).to(depth.dtype)
    directions = (to_world @ pixels.flatten(1)).reshape(*depth.shape[:2], 3, height, width)
    depth = torch.where(valid_depth(depth), depth, torch.full_like(depth, torch.nan))
    centres = cam_to_world[..., :3, 3].to(depth.dtype)
    points: Tensor = centres[..., None, None] + directions * depth[:, :, None]
    return points
