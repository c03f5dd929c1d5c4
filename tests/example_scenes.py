"""A small scene with exact depth and cameras, by formula: a checkered wall behind a checkered floor."""

from __future__ import annotations

import math

import torch

from u4d.scene import Scene

WALL_Z, FLOOR_Y = 5.2, 1.2


def wall_and_floor(frames: int = 6, size: tuple[int, int] = (24, 32), fps: float = 12.0) -> Scene:
    """The camera moves right and forward while it turns. Checks are half a unit wide, dark or orange."""
    height, width = size
    fx, fy = 0.9 * width, 0.95 * width
    intrinsics = torch.tensor([[fx, 0.0, 0.48 * width], [0.0, fy, 0.52 * height], [0.0, 0.0, 1.0]]).repeat(frames, 1, 1)
    cam_to_world = torch.eye(4).repeat(frames, 1, 1)
    for n in range(frames):
        share = n / max(frames - 1, 1)
        angle = 0.25 * share
        cam_to_world[n, 0, 0] = cam_to_world[n, 2, 2] = math.cos(angle)
        cam_to_world[n, 0, 2], cam_to_world[n, 2, 0] = math.sin(angle), -math.sin(angle)
        cam_to_world[n, :3, 3] = torch.tensor([0.8 * share, -0.1 * share**2, 1.1 * share])
    u, v = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    grid = torch.stack([u.expand(height, width), v[:, None].expand(height, width), torch.ones(height, width)], -1)
    rays = torch.einsum("nij,njk,hwk->nhwi", cam_to_world[:, :3, :3], torch.linalg.inv(intrinsics), grid)
    centres = cam_to_world[:, None, None, :3, 3]
    to_wall = (WALL_Z - centres[..., 2]) / rays[..., 2]
    to_floor = torch.where(rays[..., 1] > 1e-3, (FLOOR_Y - centres[..., 1]) / rays[..., 1].clamp_min(1e-3), torch.inf)
    depth = torch.minimum(to_wall, to_floor)
    points = centres + depth[..., None] * rays
    checks = (torch.floor(2 * points).sum(-1) % 2)[:, None]
    tint = torch.tensor([0.9, 0.5, 0.2]).reshape(1, 3, 1, 1)
    rgb = (0.15 + 0.7 * checks * tint + 0.1 * (points[..., 0:1].permute(0, 3, 1, 2) / 5).clamp(0, 1)).clamp(0, 1)
    return Scene(rgb, depth, intrinsics, cam_to_world, caption="a wall and a floor", fps=fps, scale=2.5)
