"""Clips with everything known, for the tests of streams and latents."""

from __future__ import annotations

import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from u4d.clips import Clips
from u4d.geometry.cameras import fov_to_intrinsics, relative_to_first

SIZE = (48, 64)


def random_clips(frames: int, batch: int = 2, seed: int = 0, unit: float = 1.0) -> Clips:
    """Random images, depths and a camera path from the identity; lengths are in metres times `unit`."""
    generator = torch.Generator().manual_seed(seed)
    turns = 0.3 * torch.randn(batch * frames, 3, generator=generator)
    cam_to_world = torch.eye(4).repeat(batch, frames, 1, 1)
    cam_to_world[..., :3, :3] = torch.from_numpy(Rotation.from_rotvec(turns.numpy()).as_matrix()).view(
        batch, frames, 3, 3
    )
    cam_to_world[..., :3, 3] = unit * torch.randn(batch, frames, 3, generator=generator)
    fov_rad = 0.8 + 0.6 * torch.rand(batch, 1, generator=generator)
    return Clips(
        rgb=torch.rand(batch, frames, 3, *SIZE, generator=generator),
        depth=unit * (0.5 + 5 * torch.rand(batch, frames, *SIZE, generator=generator)),
        intrinsics=fov_to_intrinsics(fov_rad.expand(-1, frames), SIZE),
        cam_to_world=relative_to_first(cam_to_world),
    )


def assert_same_cameras(found: Clips, truth: Clips, tolerance: float = 1e-4) -> None:
    """Focal lengths and principal points to that fraction of the image, poses to that fraction of their extent."""
    extent = float(truth.cam_to_world[..., :3, 3].abs().max())
    torch.testing.assert_close(found.intrinsics, truth.intrinsics, rtol=0, atol=tolerance * SIZE[1])
    rotation, centres = (slice(None), slice(None), slice(3), slice(3)), (slice(None), slice(None), slice(3), 3)
    torch.testing.assert_close(found.cam_to_world[rotation], truth.cam_to_world[rotation], rtol=0, atol=tolerance)
    torch.testing.assert_close(
        found.cam_to_world[centres], truth.cam_to_world[centres], rtol=0, atol=tolerance * max(extent, 1e-6)
    )


def with_holes(depth: Tensor, seed: int = 0) -> Tensor:
    """Depth with one pixel in five invalid, in all the ways that depth can be."""
    generator = torch.Generator().manual_seed(seed)
    holes = torch.rand(depth.shape, generator=generator) < 0.2
    kinds = torch.tensor([0.0, float("nan"), float("inf"), -1.0])
    values = kinds[torch.randint(4, depth.shape, generator=generator)]
    return torch.where(holes, values, depth)
