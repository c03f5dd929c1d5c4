"""Backward warp of frames into each other's views through depth and cameras, in plain torch.

Source: the seed's section on test-time search (the warp from frame i to frame j) and spec.md section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BORDER_TOLERANCE_PX = 0.01
"""How far beyond the outermost pixel centres a position may lie, to be pulled back onto them.

float32 places a pixel that lands exactly on the border up to about 1e-3 pixels off, and an image must map onto itself
completely."""


@dataclass(frozen=True)
class Landing:
    """Where the pixels of frames j land in frames i; the kernels call it the same.

    Attributes:
        x, y: [B,M,H,W] position in texels (0 is the first pixel's centre), inside the image; 0 where not `inside`.
        z: [B,M,H,W] depth in camera i; 1 where not `inside`.
        inside: [B,M,H,W] bool: depth of j is valid, the point is in front of camera i and lands inside its image.
        free_x, free_y: [B,M,H,W] bool: not pulled back onto the border, so that the position moves with the depth.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    inside: Tensor
    free_x: Tensor
    free_y: Tensor


@dataclass(frozen=True)
class Sight:
    """What frames i show of the pixels of frames j.

    Attributes:
        landing: where they land.
        valid: [B,M,H,W] bool: inside and not hidden.
        rays, offset: x, y, z of A [u v 1], each [B,M,H,W], and of b, each [B,M,1,1]; p = depth * ray + offset.
    """

    landing: Landing
    valid: Tensor
    rays: tuple[Tensor, ...]
    offset: tuple[Tensor, ...]


def warp_frames(
    rgb: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    *,
    occlusion: float | None = 0.05,
) -> tuple[Tensor, Tensor]:
    """Warp frames i into the views of frames j: the specification of `u4d_fast.warp_frames`, which documents it.

    Any floating dtype; differentiable in rgb, depth, intrinsics and cam_to_world.
    """
    sight = look(depth, intrinsics, cam_to_world, pairs, occlusion)
    warped = sample_bilinear(rgb[:, pairs[:, 0]], sight.landing.x, sight.landing.y)
    return torch.where(sight.valid[:, :, None], warped, torch.zeros_like(warped)), sight.valid


def warp_frames_rgb_grad(
    grad_warped: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    *,
    occlusion: float | None = 0.05,
) -> Tensor:
    """Gradient of `warp_frames` in rgb, [B,N,3,H,W]: the bilinear weights times grad_warped [B,M,3,H,W], scattered.

    Written out because autograd cannot run inside an operator that torch calls.
    """
    batch, frames, height, width = depth.shape
    sight = look(depth, intrinsics, cam_to_world, pairs, occlusion)
    grad = torch.where(sight.valid[:, :, None], grad_warped, torch.zeros_like(grad_warped)).flatten(3)
    out = grad.new_zeros(batch, frames, 3, height * width)
    for index, weight in bilinear_taps(sight.landing.x, sight.landing.y):
        places = index.flatten(2)[:, :, None].expand_as(grad)
        share = torch.zeros_like(grad).scatter_add(3, places, grad * weight.flatten(2)[:, :, None])
        out = out.index_add(1, pairs[:, 0], share)
    return out.view(batch, frames, 3, height, width)


def warp_frames_depth_grad(
    grad_warped: Tensor,
    rgb: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    *,
    occlusion: float | None = 0.05,
) -> Tensor:
    """Gradient of `warp_frames` in depth, [B,N,H,W]: the image's slope times the motion of the position with the depth.

    Written out because autograd cannot run inside an operator that torch calls.
    """
    sight = look(depth, intrinsics, cam_to_world, pairs, occlusion)
    at, images = sight.landing, rgb[:, pairs[:, 0]]
    height, width = depth.shape[-2:]
    fx, fy = at.x - first_texel(at.x, width), at.y - first_texel(at.y, height)
    upper_left, upper_right, lower_left, lower_right = (take(images, index) for index, _ in bilinear_taps(at.x, at.y))
    grad = torch.where(sight.valid[:, :, None], grad_warped, torch.zeros_like(grad_warped))
    twist = upper_left - upper_right - lower_left + lower_right
    slope_x = (grad * (upper_right - upper_left + fy[:, :, None] * twist)).sum(2)
    slope_y = (grad * (lower_left - upper_left + fx[:, :, None] * twist)).sum(2)
    # p = depth * ray + b, so the position p.x / p.z moves by (ray.x b.z - ray.z b.x) / z^2.
    (ray_x, ray_y, ray_z), (b_x, b_y, b_z) = sight.rays, sight.offset
    moved_x = slope_x * (ray_x * b_z - ray_z * b_x) / at.z.square() * at.free_x
    moved_y = slope_y * (ray_y * b_z - ray_z * b_y) / at.z.square() * at.free_y
    share = torch.where(sight.valid, moved_x + moved_y, torch.zeros_like(moved_x))
    return torch.zeros_like(depth).index_add(1, pairs[:, 1], share)


def look(depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None) -> Sight:
    """Everything about a warp but the colours."""
    source, target = pairs[:, 0], pairs[:, 1]
    intrinsics, cam_to_world, usable = usable_cameras(intrinsics.double(), cam_to_world.double())
    homography, offset = relate_cameras(intrinsics, cam_to_world, pairs)
    rays = rays_into(homography.to(depth.dtype), *depth.shape[-2:])
    offsets = offset.to(depth.dtype)[..., None].unbind(2)
    landing = land(depth[:, target], rays, offsets)
    valid = landing.inside & (usable[:, source] & usable[:, target])[..., None, None]
    if occlusion is not None:
        valid = valid & unoccluded(landing, depth[:, source], occlusion)
    return Sight(landing, valid, rays, offsets)


def usable_cameras(intrinsics: Tensor, cam_to_world: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put the identity in the place of cameras that are not finite or singular, so that they spoil nothing else.

    Returns:
        intrinsics, cam_to_world, and which frames kept theirs: [B,N] bool.
    """
    numbers = torch.cat((intrinsics.flatten(2), cam_to_world[..., :3, :].flatten(2)), -1)
    usable = numbers.isfinite().all(-1)
    for matrix in (intrinsics, cam_to_world[..., :3, :3]):
        usable = usable & (determinant3(matrix.detach()) != 0)
    keep = usable[..., None, None]
    identity = torch.eye(4, dtype=intrinsics.dtype, device=intrinsics.device)
    return torch.where(keep, intrinsics, identity[:3, :3]), torch.where(keep, cam_to_world, identity), usable


def relate_cameras(intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """A = K_i R_i^-1 R_j K_j^-1 and b = K_i R_i^-1 (o_j - o_i), for p = depth * A [u v 1] + b.

    In float64: a few numbers per pair, and camera centres far from the origin would cost pixels otherwise.

    Returns:
        [B,M,3,3] and [B,M,3,1] float64.
    """
    source, target = pairs[:, 0], pairs[:, 1]
    rotation, centre = cam_to_world[..., :3, :3], cam_to_world[..., :3, 3:]
    into_image = intrinsics[:, source] @ inverse3(rotation[:, source])
    homography = into_image @ rotation[:, target] @ inverse3(intrinsics[:, target])
    return homography, into_image @ (centre[:, target] - centre[:, source])


def inverse3(matrix: Tensor) -> Tensor:
    """Inverse of [...,3,3] by cross products, which under torch.compile is no call of LAPACK."""
    first, second, third = matrix.unbind(-2)
    crosses = (torch.linalg.cross(second, third), torch.linalg.cross(third, first), torch.linalg.cross(first, second))
    return torch.stack(crosses, -1) / determinant3(matrix)[..., None, None]


def determinant3(matrix: Tensor) -> Tensor:
    """Determinant of [...,3,3]: [...]."""
    first, second, third = matrix.unbind(-2)
    determinant: Tensor = (first * torch.linalg.cross(second, third)).sum(-1)
    return determinant


def rays_into(homography: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    """A [u v 1] for all pixel centres: x, y, z, each [B,M,H,W]."""
    v, u = torch.meshgrid(
        torch.arange(height, dtype=homography.dtype, device=homography.device) + 0.5,
        torch.arange(width, dtype=homography.dtype, device=homography.device) + 0.5,
        indexing="ij",
    )
    a = homography[..., None, None]
    return tuple(a[:, :, k, 0] * u + a[:, :, k, 1] * v + a[:, :, k, 2] for k in range(3))


def land(depth: Tensor, rays: tuple[Tensor, ...], offsets: tuple[Tensor, ...]) -> Landing:
    """Place every pixel of frames j in frames i.

    Args:
        depth: [B,M,H,W] of frames j.
        rays, offsets: x, y, z of A [u v 1] and of b, each [B,M,H,W] and [B,M,1,1].
    """
    height, width = depth.shape[-2:]
    largest = torch.finfo(torch.float32).max
    measured = (depth > 0) & (depth <= largest)
    # Safe numbers go in where the result will not be used: a NaN there would come back through the gradient.
    depth = torch.where(measured, depth, torch.ones_like(depth))
    x, y, z = (depth * ray + offset for ray, offset in zip(rays, offsets, strict=True))
    in_front = (z > 0) & (z <= largest)
    z = torch.where(in_front, z, torch.ones_like(z))
    x, y = x / z - 0.5, y / z - 0.5
    in_image = (x >= -BORDER_TOLERANCE_PX) & (x <= width - 1 + BORDER_TOLERANCE_PX)
    in_image = in_image & (y >= -BORDER_TOLERANCE_PX) & (y <= height - 1 + BORDER_TOLERANCE_PX)
    inside = measured & in_front & in_image
    free_x, free_y = (x >= 0) & (x <= width - 1), (y >= 0) & (y <= height - 1)
    x = torch.where(inside, x, torch.zeros_like(x)).clamp(0, max(width - 1, 0))
    y = torch.where(inside, y, torch.zeros_like(y)).clamp(0, max(height - 1, 0))
    return Landing(x, y, torch.where(inside, z, torch.ones_like(z)), inside, free_x, free_y)


def unoccluded(landing: Landing, depth: Tensor, occlusion: float) -> Tensor:
    """Not behind the surface of frame i by more than a relative `occlusion`; depth is [B,M,H,W] of frames i.

    The depth is that of the nearest pixel: an average across a depth edge is the depth of no surface, would hide the
    background beside the edge and show what is behind it. A pixel of i without depth can't be tested and shows nothing.
    """
    width = depth.shape[-1]
    nearest = (landing.y + 0.5).long() * width + (landing.x + 0.5).long()
    depth = depth.flatten(2).gather(2, nearest.flatten(2)).view_as(landing.z)
    return (depth <= torch.finfo(torch.float32).max) & (landing.z <= depth * (1.0 + occlusion))


def sample_bilinear(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample [B,M,C,H,W] at texel positions x, y [B,M,H,W] that lie inside the image: [B,M,C,H,W]."""
    return sum(
        (take(images, index) * weight[:, :, None] for index, weight in bilinear_taps(x, y)), torch.zeros_like(images)
    )


def bilinear_taps(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Texel index and weight, each [B,M,H,W], of upper left, upper right, lower left, lower right."""
    height, width = x.shape[-2:]
    x0, y0 = first_texel(x, width), first_texel(y, height)
    x1, y1 = (x0 + 1).clamp(max=max(width - 1, 0)), (y0 + 1).clamp(max=max(height - 1, 0))
    fx, fy = x - x0, y - y0
    return [
        (y0 * width + x0, (1 - fx) * (1 - fy)),
        (y0 * width + x1, fx * (1 - fy)),
        (y1 * width + x0, (1 - fx) * fy),
        (y1 * width + x1, fx * fy),
    ]


def first_texel(position: Tensor, size: int) -> Tensor:
    """The left or upper tap: never the last texel (unless it is the only one), so that its neighbour exists."""
    return position.detach().long().clamp(max=max(size - 2, 0))


def take(images: Tensor, index: Tensor) -> Tensor:
    """Texels of [B,M,C,H,W] at flat indices [B,M,H,W]."""
    flat = images.flatten(3)
    return flat.gather(3, index.flatten(2)[:, :, None].expand(-1, -1, flat.shape[2], -1)).view_as(images)
