"""Random cameras and their rays by definition, not by the code under test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import u4d_fast

KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", *KERNELS]
SIZE = (240, 320)
SMALL = (72, 96)


@dataclass(frozen=True)
class Cameras:
    """A batch of clips: intrinsics [B,N,3,3], cam_to_world [B,N,4,4], float64."""

    intrinsics: Tensor
    cam_to_world: Tensor
    image_size: tuple[int, int]


def random_cameras(
    batch: int,
    frames: int,
    image_size: tuple[int, int] = (240, 320),
    *,
    seed: int = 0,
    fov_deg: tuple[float, float] = (20.0, 120.0),
    centre_offset: float = 0.2,
    distance: float = 100.0,
    aspect: float = 0.1,
    one_per_clip: bool = False,
) -> Cameras:
    """Any rotation; the field of view is over the width, the principal point off by up to a share of the side."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=g)

    kinds = 1 if one_per_clip else frames
    height, width = image_size
    fx = width / 2 / torch.tan(uniform(math.radians(fov_deg[0]), math.radians(fov_deg[1]), batch, kinds) / 2)
    intrinsics = torch.zeros(batch, kinds, 3, 3, dtype=torch.float64)
    intrinsics[..., 0, 0] = fx
    intrinsics[..., 1, 1] = fx * (1 + uniform(-aspect, aspect, batch, kinds))
    intrinsics[..., 0, 2] = width * (0.5 + uniform(-centre_offset, centre_offset, batch, kinds))
    intrinsics[..., 1, 2] = height * (0.5 + uniform(-centre_offset, centre_offset, batch, kinds))
    intrinsics[..., 2, 2] = 1.0

    cam_to_world = torch.eye(4, dtype=torch.float64).repeat(batch, frames, 1, 1)
    cam_to_world[..., :3, :3] = random_rotations(g, batch, frames)
    direction = torch.randn(batch, frames, 3, generator=g, dtype=torch.float64)
    radius = uniform(0.0, distance, batch, frames, 1)
    cam_to_world[..., :3, 3] = radius * direction / direction.norm(dim=-1, keepdim=True)
    return Cameras(intrinsics.expand(batch, frames, 3, 3).clone(), cam_to_world, image_size)


def random_rotations(generator: torch.Generator, *shape: int) -> Tensor:
    """[*shape,3,3] uniformly distributed: the orthogonal factor of a Gaussian matrix, made right-handed."""
    q, r = torch.linalg.qr(torch.randn(*shape, 3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return q * torch.linalg.det(q)[..., None, None]


def rays_by_definition(cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Directions and moments [B,N,3,h,w] in float64, cell by cell: a second implementation, slow and obvious."""
    height, width = cameras.image_size
    batch, frames = cameras.intrinsics.shape[:2]
    directions = torch.empty(batch, frames, 3, height // 8, width // 8, dtype=torch.float64)
    moments = torch.empty_like(directions)
    inverse = torch.linalg.inv(cameras.intrinsics)
    centres = cameras.cam_to_world[..., :3, 3]
    for row in range(height // 8):
        for column in range(width // 8):
            pixel = torch.tensor([8 * column + 4.0, 8 * row + 4.0, 1.0], dtype=torch.float64)
            ray = (cameras.cam_to_world[..., :3, :3] @ inverse @ pixel[:, None]).squeeze(-1)
            ray = ray / ray.norm(dim=-1, keepdim=True)
            directions[..., row, column] = ray
            moments[..., row, column] = torch.linalg.cross(centres, ray)
    return directions, moments


def with_noise(directions: Tensor, moments: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian noise of `share` on the unit directions, and of `share` of their size on the moments."""
    g = torch.Generator().manual_seed(seed)
    size = moments.square().sum(2, keepdim=True).mean((-2, -1), keepdim=True).sqrt()
    noise = [torch.randn(directions.shape, generator=g, dtype=directions.dtype) for _ in range(2)]
    return directions + share * noise[0], moments + share * size * noise[1]


def rotation_error_deg(a: Tensor, b: Tensor) -> Tensor:
    """Angle between the rotations of two batches of poses; exact for small angles too."""
    r = a[..., :3, :3].double().mT @ b[..., :3, :3].double()
    axis = torch.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], dim=-1)
    return torch.rad2deg(torch.atan2(axis.norm(dim=-1), r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1))


def assert_camera_close(
    found: tuple[Tensor, Tensor, Tensor], cameras: Cameras, relative: float, where: Tensor | None = None
) -> None:
    """Intrinsics, rotation and centre to a relative error, on the frames of a mask [B,N]."""
    intrinsics, cam_to_world, _ = (value.cpu().double() for value in found)
    where = torch.ones(cameras.intrinsics.shape[:2], dtype=torch.bool) if where is None else where
    focal = torch.stack([cameras.intrinsics[..., 0, 0], cameras.intrinsics[..., 1, 1]], dim=-1)
    found_focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)
    assert ((found_focal - focal).abs() / focal)[where].max() < relative
    offset = (intrinsics[..., :2, 2] - cameras.intrinsics[..., :2, 2]).abs().amax(-1)
    assert (offset / max(cameras.image_size))[where].max() < relative
    assert (cam_to_world[..., :3, :3] - cameras.cam_to_world[..., :3, :3]).abs().amax((-1, -2))[where].max() < relative
    away = (cam_to_world[..., :3, 3] - cameras.cam_to_world[..., :3, 3]).norm(dim=-1)
    assert (away / cameras.cam_to_world[..., :3, 3].norm(dim=-1).clamp_min(1.0))[where].max() < relative


def fit(directions: Tensor, moments: Tensor, size: tuple[int, int], backend: str, **options) -> tuple[Tensor, ...]:
    """The op in float32 on the device of its backend; results on the CPU, and never NaN."""
    device = "cuda" if backend == "cuda" else "cpu"
    if "intrinsics" in options:
        options["intrinsics"] = options["intrinsics"].float().to(device)
    given = (directions.float().to(device), moments.float().to(device))
    found = u4d_fast.rays_to_cameras(*given, size, backend=backend, **options)
    assert not any(value.isnan().any() for value in found)
    assert found[0].isfinite().all() and found[1].isfinite().all()
    return tuple(value.cpu() for value in found)
