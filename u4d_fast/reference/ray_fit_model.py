"""What the steps of fitting cameras to rays have in common: the camera's parameters and robust errors.

Part of the specification of `rays_to_cameras`; the method is described there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ERROR_FLOOR = 1e-7  # radians: what float32 directions are good for
ROBUST_WIDTH = 3.0  # errors of this many noise levels have a quarter of their weight
FALLBACK_HALF_FOV_TAN = math.tan(math.radians(30.0))  # over the longer side
MIN_HALF_FOV_TAN, MAX_HALF_FOV_TAN = 0.005, 100.0  # half a degree, and nearly 180
MAX_CENTRE_OFFSET = 3.0  # of the principal point from the middle of the image, in half sides


@dataclass(frozen=True)
class Rays:
    """Ray maps of M frames with C cells. Cells without a usable ray hold zeros and weight 0.

    Frames that determine no camera hold the rays of an ordinary one, so that no step meets a singular matrix; what is
    fitted to them is thrown away.

    Attributes:
        directions: [M,C,3] unit.
        moments: [M,C,3].
        weights: [M,C] 1 or 0.
        points: [C,3] cell centres (x, y, 1), the longer side of the image from -1 to 1.
        undetermined: [M] too few cells, or all directions in one plane.
    """

    directions: Tensor
    moments: Tensor
    weights: Tensor
    points: Tensor
    undetermined: Tensor


@dataclass(frozen=True)
class Fit:
    """Cameras being fitted. A ray in the camera is (ax x + b y - gx, ay y - gy, 1), with x, y in [-1,1].

    Attributes:
        rotations: [M,3,3] camera to world.
        inverse_k: [M,5] ax, gx, ay, gy, b. The ray is linear in them, so steps are well scaled. b (skew) is never
            fitted.
        failed: [M] no camera was found.
    """

    rotations: Tensor
    inverse_k: Tensor
    failed: Tensor


def inverse_k_of(intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """[M,3,3] intrinsics in pixels as the [M,5] numbers of `Fit`."""
    height, width = image_size
    fx, skew, cx = intrinsics[:, 0].unbind(-1)
    fy, cy = intrinsics[:, 1, 1], intrinsics[:, 1, 2]
    half_side = max(image_size) / 2
    ay, gy = half_side / fy, (cy - height / 2) / fy
    gx = (cx - width / 2 - skew * gy) / fx
    return torch.stack([half_side / fx, gx, ay, gy, -skew * ay / fx], dim=-1)


def intrinsics_of(inverse_k: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The inverse of `inverse_k_of`, for cameras without skew."""
    height, width = image_size
    ax, gx, ay, gy, _ = inverse_k.unbind(-1)
    half_side = max(image_size) / 2
    intrinsics = torch.zeros(*ax.shape, 3, 3, dtype=ax.dtype, device=ax.device)
    intrinsics[..., 0, 0], intrinsics[..., 0, 2] = half_side / ax, width / 2 + gx * half_side / ax
    intrinsics[..., 1, 1], intrinsics[..., 1, 2] = half_side / ay, height / 2 + gy * half_side / ay
    intrinsics[..., 2, 2] = 1.0
    return intrinsics


def camera_rays(inverse_k: Tensor, points: Tensor) -> Tensor:
    """[M,C,3] directions in the camera, z = 1."""
    ax, gx, ay, gy, b = inverse_k[:, None].unbind(-1)
    x, y, one = points.unbind(-1)
    return torch.stack([ax * x + b * y - gx, ay * y - gy, one.expand(ax.shape[0], -1)], dim=-1)


def unit(vectors: Tensor) -> Tensor:
    """The last dimension scaled to length 1."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length


def plausible(inverse_k: Tensor) -> Tensor:
    """[M] whether the numbers are a camera that one could build."""
    ax, gx, ay, gy, _ = inverse_k.unbind(-1)
    sane = inverse_k.isfinite().all(-1)
    for a, g in ((ax, gx), (ay, gy)):
        sane = sane & (a > MIN_HALF_FOV_TAN) & (a < MAX_HALF_FOV_TAN) & (g.abs() < MAX_CENTRE_OFFSET * a)
    return sane


def fallback_inverse_k(like: Tensor) -> Tensor:
    """[M,5] for a tensor [M,...]."""
    values = [FALLBACK_HALF_FOV_TAN, 0.0, FALLBACK_HALF_FOV_TAN, 0.0, 0.0]
    return torch.tensor(values, dtype=like.dtype, device=like.device).expand(len(like), -1)


def angular_errors(rays: Rays, fit: Fit) -> Tensor:
    """[M,C] chords between observed and fitted unit directions: angles, to second order."""
    chords: Tensor = torch.linalg.vector_norm(rays.directions - world_directions(rays, fit), dim=-1)
    return chords


def world_directions(rays: Rays, fit: Fit) -> Tensor:
    """[M,C,3] unit directions of the fitted cameras."""
    return unit(camera_rays(fit.inverse_k, rays.points)) @ fit.rotations.mT


def robust_width(errors: Tensor, weights: Tensor, robust: bool, floor: Tensor | float = ERROR_FLOOR) -> Tensor:
    """[M] the error at which the weight is a quarter; infinite where nothing is to lose weight."""
    if not robust:
        return torch.full_like(errors[:, 0], math.inf)
    errors = errors.clamp_min(torch.as_tensor(floor, dtype=errors.dtype, device=errors.device))
    level = ((weights * errors).sum(-1) / (weights / errors).sum(-1)).sqrt()
    return ROBUST_WIDTH * torch.where(level.isfinite(), level, 1.0)


def robust_weights(errors: Tensor, width: Tensor) -> Tensor:
    """[M,C] weights of Geman and McClure."""
    return (1 + (errors / width[:, None]).square()).square().reciprocal()
