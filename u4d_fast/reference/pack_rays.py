"""Cameras to packed Plücker ray latents, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast.time_layout import frame_groups

CELL = 8  # pixels along the side of a latent cell
RAY_CHANNELS = 16  # 4 frames x 3 coordinates, then 4 channels of zeros: the width of the other streams' latents


def pack_rays(
    intrinsics: Tensor, cam_to_world: Tensor, scale: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Specification of `u4d_fast.pack_rays`: same arguments and results, any floating dtype."""
    directions, moments = cell_rays(intrinsics, cam_to_world, scale, image_size)
    groups = frame_groups(intrinsics.shape[1]).to(intrinsics.device)
    return _pack(directions, groups), _pack(moments, groups)


def cell_rays(
    intrinsics: Tensor, cam_to_world: Tensor, scale: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Unit directions and moments through the centres of the 8x8 blocks, each [B,N,3,h,w]."""
    height, width = image_size
    columns = CELL * (torch.arange(width // CELL, device=intrinsics.device) + 0.5)
    rows = CELL * (torch.arange(height // CELL, device=intrinsics.device) + 0.5)
    v, u = torch.meshgrid(rows.to(intrinsics.dtype), columns.to(intrinsics.dtype), indexing="ij")

    fx, skew, cx, fy, cy = (
        intrinsics[..., row, column, None, None] for row, column in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2))
    )
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    in_camera = torch.stack([x, y, torch.ones_like(x)], dim=2)

    in_world = torch.einsum("bnij,bnjhw->bnihw", cam_to_world[..., :3, :3], in_camera)
    directions = in_world / in_world.square().sum(dim=2, keepdim=True).sqrt()
    centres = cam_to_world[..., :3, 3] / scale[:, None, None]
    moments = torch.linalg.cross(centres[..., None, None].expand_as(directions), directions, dim=2)
    return directions, moments


def _pack(per_frame: Tensor, groups: Tensor) -> Tensor:
    batch, _, _, rows, columns = per_frame.shape
    latent_frames = groups.shape[0]
    packed = per_frame[:, groups.flatten()].reshape(batch, latent_frames, 12, rows, columns).transpose(1, 2)
    empty = packed.new_zeros(batch, RAY_CHANNELS - 12, latent_frames, rows, columns)
    return torch.cat([packed, empty], dim=1)
