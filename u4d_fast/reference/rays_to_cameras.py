"""Ray maps to pinhole cameras, in plain torch.

The fit of a frame (spec.md section 1), always in float64:

1. A direct linear transform gives the 3x3 matrix A with d ∝ A [x y 1]^T, in pixel coordinates scaled to [-1,1]
   (Hartley, "In defense of the eight-point algorithm", 1997): the eigenvector of the least eigenvalue of the sum over
   cells of w (p p^T) ⊗ (I - d d^T). It is solved a few times, reweighted by its own angular errors; a robust
   regression d ≈ A p, which no outlier can bend far, gives the first weights.
2. A = R K^-1 is split by a QR decomposition, and skew dropped. Where that is no camera (mirrored, absurd focal
   lengths), a camera of 60 degrees with the best rotation for it is the start instead.
3. Levenberg-Marquardt minimises the robust angular error over rotation and intrinsics, which makes much less of the
   linear fit's preference for wide cameras under noise. Shared intrinsics are eliminated last, by a Schur complement,
   so a clip of any length costs a 4x4 system.
4. The centre o is the robust least-squares solution of m = o x q, with q the fitted camera's directions: the noise of
   the observed ones would draw o towards the origin.

Errors r beyond a few times the noise level s lose their weight (Geman and McClure, 1987). The level needs no sorting:
noise of deviation s on the two angles of a direction gives errors with a Rayleigh distribution, for which
s^2 = sum(r) / sum(1/r).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from u4d_fast.reference.pack_rays import CELL
from u4d_fast.reference.ray_fit_model import (
    ERROR_FLOOR,
    Fit,
    Rays,
    angular_errors,
    camera_rays,
    fallback_inverse_k,
    intrinsics_of,
    inverse_k_of,
    plausible,
    robust_weights,
    robust_width,
    unit,
    world_directions,
)
from u4d_fast.reference.ray_fit_refinement import free_intrinsics, refine

REGRESSION_ROUNDS = 4
REGRESSION_FLOOR = 0.01
LINEAR_ROUNDS = 3  # linear solves, each but the first reweighted by the errors of the one before
REFINE_STAGES = 2  # each estimates the noise level anew
CENTRE_ROUNDS = 6
MIN_CELLS = 4
MIN_SPREAD = 1e-7  # least eigenvalue of the mean of d d^T; less is all directions in one plane, or all equal


@torch.no_grad()
def rays_to_cameras(
    directions: Tensor,
    moments: Tensor,
    image_size: tuple[int, int],
    *,
    intrinsics: Tensor | None = None,
    shared_intrinsics: bool = False,
    square_pixels: bool = False,
    robust: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Specification of `u4d_fast.rays_to_cameras`: same arguments and results, any floating dtype."""
    batch, frames = directions.shape[:2]
    rays = prepare_rays(directions, moments, image_size)
    if intrinsics is None:
        fit = start_from_linear_fit(rays, robust)
        if square_pixels:
            fit = replace(fit, inverse_k=_squared(fit.inverse_k))
        if shared_intrinsics:
            fit = replace(fit, inverse_k=_shared(fit, frames))
    else:
        fit = start_from_known(rays, inverse_k_of(intrinsics.flatten(0, 1).double(), image_size), robust)

    free = free_intrinsics(intrinsics is not None, square_pixels).to(directions.device)
    error_weights = rays.weights
    for _ in range(REFINE_STAGES):
        width = robust_width(angular_errors(rays, fit), error_weights, robust)
        fit = refine(rays, fit, width, free, frames if shared_intrinsics else 1)
        error_weights = rays.weights * robust_weights(angular_errors(rays, fit), width)
    if intrinsics is None:
        fit = replace(fit, failed=fit.failed | ~plausible(fit.inverse_k))
    residual = _angular_rms(rays, fit).masked_fill(fit.failed, math.inf)
    centres = fit_centres(rays, fit, robust)

    cam_to_world = torch.eye(4, dtype=torch.float64, device=directions.device).repeat(batch * frames, 1, 1)
    cam_to_world[:, :3, :3] = torch.where(fit.failed[:, None, None], cam_to_world[:, :3, :3], fit.rotations)
    cam_to_world[:, :3, 3] = torch.where(fit.failed[:, None], 0.0, centres)
    if intrinsics is None:
        fitted = intrinsics_of(_without_failed(fit, frames if shared_intrinsics else 1), image_size)
    else:
        fitted = intrinsics.flatten(0, 1)
    return (
        fitted.to(directions.dtype).unflatten(0, (batch, frames)),
        cam_to_world.to(directions.dtype).unflatten(0, (batch, frames)),
        residual.to(directions.dtype).unflatten(0, (batch, frames)),
    )


def prepare_rays(directions: Tensor, moments: Tensor, image_size: tuple[int, int]) -> Rays:
    """Ray maps [B,N,3,h,w] as `Rays` of M = B N frames."""
    rows, columns = directions.shape[3:]
    directions = directions.flatten(0, 1).flatten(2).transpose(1, 2).double()
    moments = moments.flatten(0, 1).flatten(2).transpose(1, 2).double()
    length = directions.norm(dim=-1)
    usable = directions.isfinite().all(-1) & moments.isfinite().all(-1) & (length > 1e-6)
    directions = torch.where(usable[..., None], directions / length[..., None], 0.0)
    moments = torch.where(usable[..., None], moments, 0.0)

    half_side = max(image_size) / 2
    x = (CELL * (torch.arange(columns, device=directions.device) + 0.5) - image_size[1] / 2).double() / half_side
    y = (CELL * (torch.arange(rows, device=directions.device) + 0.5) - image_size[0] / 2).double() / half_side
    y, x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1)

    scatter = directions.mT @ directions / usable.sum(-1).clamp_min(1)[:, None, None]
    undetermined = (usable.sum(-1) < MIN_CELLS) | (torch.linalg.eigvalsh(scatter)[:, 0] < MIN_SPREAD)
    ordinary = unit(camera_rays(fallback_inverse_k(directions[:, 0]), points))
    return Rays(
        directions=torch.where(undetermined[:, None, None], ordinary, directions),
        moments=moments.masked_fill(undetermined[:, None, None], 0.0),
        weights=(usable | undetermined[:, None]).double(),
        points=points,
        undetermined=undetermined,
    )


def _angular_rms(rays: Rays, fit: Fit) -> Tensor:
    angles = 2 * torch.asin((angular_errors(rays, fit) / 2).clamp_max(1.0))
    return ((rays.weights * angles**2).sum(-1) / rays.weights.sum(-1)).sqrt()


def start_from_linear_fit(rays: Rays, robust: bool) -> Fit:
    """Rotation and intrinsics from the direct linear transform."""
    trust = _regression_weights(rays) if robust else rays.weights
    length = torch.ones_like(trust)
    for _ in range(LINEAR_ROUNDS):
        matrix = _linear_fit(rays, trust / length**2)
        mapped = rays.points @ matrix.mT
        length = mapped.norm(dim=-1).clamp_min(1e-9)
        errors = (rays.directions - mapped / length[..., None]).norm(dim=-1)
        trust = rays.weights * robust_weights(errors, robust_width(errors, trust, robust))

    # The diagonal of U, and with it the focal lengths, is made positive; U U22^-1 is K^-1 with skew.
    rotations, upper = torch.linalg.qr(matrix)
    signs = upper.diagonal(dim1=-2, dim2=-1).sign()
    rotations, upper = rotations * signs[:, None, :], upper * signs[:, :, None]
    upper = upper / upper[:, 2:, 2:]
    no_skew = torch.zeros_like(upper[:, 0, 0])
    columns = (upper[:, 0, 0], -upper[:, 0, 2], upper[:, 1, 1], -upper[:, 1, 2], no_skew)
    inverse_k = torch.stack(columns, dim=-1)
    good = plausible(inverse_k) & (torch.linalg.det(rotations) > 0)

    other = start_from_known(rays, fallback_inverse_k(inverse_k), robust)
    return Fit(
        rotations=torch.where(good[:, None, None], rotations, other.rotations),
        inverse_k=torch.where(good[:, None], inverse_k, other.inverse_k),
        failed=rays.undetermined,
    )


def _regression_weights(rays: Rays) -> Tensor:
    """[M,C] weights from a robust regression d ≈ A p: crude for wide cameras, but no error in d can bend it far."""
    trust = rays.weights
    for _ in range(REGRESSION_ROUNDS):
        weighted = trust[..., None] * rays.points
        solution = torch.linalg.solve_ex(weighted.mT @ rays.points, weighted.mT @ rays.directions).result
        errors = (rays.directions - rays.points @ solution).norm(dim=-1)
        trust = rays.weights * robust_weights(errors, robust_width(errors, trust, True, REGRESSION_FLOOR))
    # An image of one row or one column has no such A.
    return torch.where(trust.isfinite().all(-1, keepdim=True), trust, rays.weights)


def _linear_fit(rays: Rays, weights: Tensor) -> Tensor:
    """[M,3,3] A with d ∝ +A p in the weighted least-squares sense, Frobenius norm 1."""
    across = (
        torch.eye(3, dtype=torch.float64, device=weights.device)
        - rays.directions[..., None] * rays.directions[..., None, :]
    )
    products = rays.points[:, :, None] * rays.points[:, None, :]
    normal = torch.einsum("mc,mckl,cij->mkilj", weights, across, products).reshape(-1, 9, 9)
    matrix = torch.linalg.eigh(normal).eigenvectors[..., 0].unflatten(-1, (3, 3))
    agreement = (weights[..., None] * rays.directions * (rays.points @ matrix.mT)).sum((1, 2))
    return torch.where(agreement[:, None, None] < 0, -matrix, matrix)


def start_from_known(rays: Rays, inverse_k: Tensor, robust: bool) -> Fit:
    """Best rotations for given intrinsics, by Kabsch's singular value decomposition."""
    in_camera = unit(camera_rays(inverse_k, rays.points))
    weights = rays.weights
    for _ in range(LINEAR_ROUNDS):
        u, _, vt = torch.linalg.svd((weights[..., None] * rays.directions).mT @ in_camera)
        flip = torch.ones_like(u[:, 0])
        flip[:, 2] = torch.linalg.det(u @ vt).sign()
        rotations = (u * flip[:, None, :]) @ vt
        errors = (rays.directions - in_camera @ rotations.mT).norm(dim=-1)
        weights = rays.weights * robust_weights(errors, robust_width(errors, rays.weights, robust))
    return Fit(rotations, inverse_k, rays.undetermined)


def _squared(inverse_k: Tensor) -> Tensor:
    ax, gx, ay, gy, b = inverse_k.unbind(-1)
    a = (ax * ay).sqrt()
    return torch.stack([a, gx, a, gy, b], dim=-1)


def _shared(fit: Fit, frames: int) -> Tensor:
    """The median intrinsics of a clip's frames, for each of them."""
    values = torch.unflatten(fit.inverse_k.masked_fill(fit.failed[:, None], math.nan), 0, (-1, frames))
    median = values.nanmedian(dim=1, keepdim=True).values.expand(-1, frames, -1).flatten(0, 1)
    return torch.where(median.isfinite(), median, fallback_inverse_k(median))


def _without_failed(fit: Fit, frames: int) -> Tensor:
    """Intrinsics with those of failed frames replaced: by the clip's where shared, else by the fallback camera's."""
    inverse_k = torch.where(fit.failed[:, None], fallback_inverse_k(fit.inverse_k), fit.inverse_k)
    if frames == 1:
        return inverse_k
    first_good = torch.unflatten(~fit.failed, 0, (-1, frames)).int().argmax(dim=1)
    clip = torch.unflatten(inverse_k, 0, (-1, frames))
    return clip[torch.arange(len(clip), device=clip.device), first_good].repeat_interleave(frames, dim=0)


def fit_centres(rays: Rays, fit: Fit, robust: bool) -> Tensor:
    """[M,3] centres o with m = o x q."""
    along = world_directions(rays, fit)
    across = torch.eye(3, dtype=torch.float64, device=along.device) - along[..., None] * along[..., None, :]
    nearest = torch.linalg.cross(along, rays.moments)
    # float32 moments are good to this share of their size; a moment of zero still needs a floor.
    mean_square = (rays.weights * rays.moments.square().sum(-1)).sum(-1) / rays.weights.sum(-1).clamp_min(1.0)
    floor = ERROR_FLOOR * mean_square.sqrt() + 1e-30
    centres = torch.zeros_like(along[:, 0])
    weights = rays.weights
    for _ in range(CENTRE_ROUNDS):
        matrix = torch.einsum("mc,mcij->mij", weights, across)
        target = torch.einsum("mc,mci->mi", weights, nearest)
        centres = torch.linalg.solve_ex(matrix, target[..., None]).result.squeeze(-1)
        errors = (rays.moments - torch.linalg.cross(centres[:, None].expand_as(along), along)).norm(dim=-1)
        width = robust_width(errors, weights, robust, floor[:, None])
        weights = rays.weights * robust_weights(errors, width)
    return centres
