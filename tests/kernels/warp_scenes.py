"""Small rendered clips with exact depth and cameras, and the comparison rule, for the tests of the warp."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from u4d_fast import warp_frames


@dataclass(frozen=True)
class Clip:
    """What the ops take: rgb [B,N,3,H,W], depth [B,N,H,W], intrinsics, cam_to_world, pairs [M,2]."""

    rgb: Tensor
    depth: Tensor
    intrinsics: Tensor
    cam_to_world: Tensor
    pairs: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.rgb, self.depth, self.intrinsics, self.cam_to_world, self.pairs

    def to(self, where: torch.dtype | str) -> Clip:
        """Another dtype for the floating tensors, or another device for all."""
        if isinstance(where, torch.dtype):
            floating = ("rgb", "depth", "intrinsics", "cam_to_world")
            return replace(self, **{name: getattr(self, name).to(where) for name in floating})
        names = ("rgb", "depth", "intrinsics", "cam_to_world", "pairs")
        return replace(self, **{name: getattr(self, name).to(where) for name in names})


def all_pairs(frames: int) -> Tensor:
    """All ordered pairs of different frames."""
    pairs = [(i, j) for i in range(frames) for j in range(frames) if i != j]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def rotation_about(axis: str, angle_rad: float) -> Tensor:
    """3x3 float64 rotation about x, y or z."""
    angle = torch.tensor(angle_rad, dtype=torch.float64)
    c, s = angle.cos(), angle.sin()
    k = "xyz".index(axis)
    a, b = (k + 1) % 3, (k + 2) % 3
    rotation = torch.eye(3, dtype=torch.float64)
    rotation[a, a], rotation[a, b], rotation[b, a], rotation[b, b] = c, -s, s, c
    return rotation


def pose(rotation: Tensor, centre: tuple[float, float, float]) -> Tensor:
    """4x4 float64 cam_to_world."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = torch.tensor(centre, dtype=torch.float64)
    return matrix


def pinhole(focal: float, height: int, width: int) -> Tensor:
    """3x3 float64 intrinsics, with a principal point a little off the centre (where there is more than one pixel)."""
    cx, cy = width / 2 + 0.7 * (width > 1), height / 2 - 0.4 * (height > 1)
    return torch.tensor([[focal, 0, cx], [0, 1.05 * focal, cy], [0, 0, 1]]).double()


def render(cam_to_world: Tensor, intrinsics: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A ball before a slanted wall with a smooth solid texture: exact colour [3,H,W] and depth [H,W], float64."""
    v, u = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    pixels = torch.stack((u, v, torch.ones_like(u)), -1)
    rays = pixels @ torch.linalg.inv(intrinsics).T @ cam_to_world[:3, :3].T  # length such that depth is the parameter
    centre = cam_to_world[:3, 3]
    normal = torch.tensor([0.15, -0.1, 1.0]).double()
    depth = (5.0 - centre @ normal) / (rays @ normal)
    to_ball = centre - torch.tensor([0.1, 0.0, 3.2]).double()
    a, b, c = (rays * rays).sum(-1), rays @ to_ball, to_ball @ to_ball - 0.5
    under_root = b * b - a * c
    ball = (-b - under_root.clamp(min=0).sqrt()) / a
    depth = torch.where((under_root > 0) & (ball > 0), ball, depth)
    points = centre + depth[..., None] * rays
    waves = torch.tensor([[2.1, 0.7, 0.4], [-0.6, 1.9, 0.8], [1.1, -1.3, 0.9]]).double()
    rgb = 0.5 + 0.4 * (points @ waves.T).sin()
    return rgb.permute(2, 0, 1), depth


def rendered_clip(height: int = 24, width: int = 32, frames: int = 4, batch: int = 2) -> Clip:
    """A camera that moves sideways, forward and turns; every clip of the batch a little differently. float32.

    The motion is a share of the image and none along a side of one pixel, so that frames overlap in any shape.
    """
    step = min(height / width, 1.0) * (height > 1)
    low = min(width / height, 1.0) * (width > 1)
    rgb, depth, intrinsics, cam_to_world = [], [], [], []
    for b in range(batch):
        for k in range(frames):
            turn = rotation_about("y", low * (0.05 * k + 0.02 * b)) @ rotation_about("x", -0.03 * step * k)
            turn = turn @ rotation_about("z", 0.04 * step * low * k)
            cam_to_world.append(pose(turn, (low * (0.15 * k - 0.1 * b), 0.05 * step * k, 0.1 * k)))
            intrinsics.append(pinhole((0.9 + 0.03 * k) * max(width, height), height, width))
            colour, distance = render(cam_to_world[-1], intrinsics[-1], height, width)
            rgb.append(colour)
            depth.append(distance)
    stacks = [
        torch.stack(part).unflatten(0, (batch, frames)).float() for part in (rgb, depth, intrinsics, cam_to_world)
    ]
    return Clip(*stacks, pairs=all_pairs(frames))


def assert_no_worse(fast: Tensor, plain: Tensor, exact: Tensor, floor: float) -> None:
    """A kernel's error against fp64 is at most twice that of plain torch in the same precision, plus a floor.

    The largest error, and the relative L2 norm of all errors.
    """
    fast_error, plain_error = (fast.double() - exact).abs(), (plain.double() - exact).abs()
    assert fast_error.max() <= 2 * plain_error.max() + floor, (fast_error.max(), plain_error.max())
    scale = exact.norm().clamp(min=1e-30)
    assert fast_error.norm() / scale <= 2 * plain_error.norm() / scale + floor


def warp_on(clip: Clip, backend: str, occlusion: float | None = 0.05) -> tuple[Tensor, Tensor]:
    """The op on the device of its backend; results on the CPU."""
    clip = clip.to("cuda" if backend == "cuda" else "cpu")
    warped, valid = warp_frames(*clip.arguments(), occlusion=occlusion, backend=backend)
    return warped.cpu(), valid.cpu()


def random_clip(height: int, width: int, frames: int = 2, batch: int = 1, seed: int = 0) -> Clip:
    """Noise images and depths in front of the cameras of `rendered_clip`."""
    g = torch.Generator().manual_seed(seed)
    clip = rendered_clip(height, width, frames, batch)
    rgb = torch.rand(batch, frames, 3, height, width, generator=g)
    return replace(clip, rgb=rgb, depth=2 + torch.rand(batch, frames, height, width, generator=g))


def flat_clip(depth_i: float, depth_j: float) -> Clip:
    """Two cameras at the same place that disagree about the distance of a wall."""
    clip = random_clip(8, 11)
    depth = torch.tensor([depth_i, depth_j])[None, :, None, None].expand(1, 2, 8, 11).clone()
    same = torch.eye(4).expand(1, 2, 4, 4)
    return replace(clip, depth=depth, intrinsics=clip.intrinsics[:, :1].expand(1, 2, 3, 3), cam_to_world=same,
                   pairs=torch.tensor([(0, 1)]))  # fmt: skip


def pixel_grid(height: int, width: int) -> Tensor:
    """Homogeneous pixel centres [3, H*W] float64."""
    v, u = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    return torch.stack((u, v, torch.ones_like(u))).flatten(1)


def sample_by_torch(image: Tensor, projected: Tensor) -> Tensor:
    """image [3,H,W] at homogeneous positions [3, H*W], by torch's own sampler."""
    _, height, width = image.shape
    x, y = projected[0] / projected[2], projected[1] / projected[2]
    grid = torch.stack((2 * x / width - 1, 2 * y / height - 1), -1).view(1, height, width, 2)
    return functional.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


def gradients_on(clip: Clip, backend: str, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of rgb and depth for given weights of `warped`, on the CPU."""
    clip = clip.to("cuda" if backend == "cuda" else "cpu")
    rgb, depth = clip.rgb.clone().requires_grad_(), clip.depth.clone().requires_grad_()
    clip = replace(clip, rgb=rgb, depth=depth)
    warped, valid = warp_frames(*clip.arguments(), backend=backend)
    assert warped.requires_grad and not valid.requires_grad
    weights = sine_weights(warped) if weights is None else weights.to(warped.device)
    grad_rgb, grad_depth = torch.autograd.grad(warped, (rgb, depth), weights)
    return grad_rgb.cpu(), grad_depth.cpu()


def sine_weights(like: Tensor) -> Tensor:
    """Fixed weights without structure."""
    return torch.arange(like.numel(), device=like.device).sin().to(like.dtype).view_as(like)
