"""Levenberg-Marquardt over the cameras of one or many frames, which may share their intrinsics.

Part of the specification of `rays_to_cameras`; the method is described there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from u4d_fast.reference.ray_fit_model import Fit, Rays, camera_rays, plausible

REFINE_ROUNDS = 6  # steps of Levenberg-Marquardt per call, refused ones included
DAMPING_START, DAMPING_MIN, DAMPING_MAX = 1e-4, 1e-10, 1e8


@dataclass(frozen=True)
class Normal:
    """The robust error of M frames at one fit, and its Gauss-Newton approximation there.

    Attributes:
        cost: [M] robust sum of squared angles.
        rr, rk, kk: [M,3,3], [M,3,4], [M,4,4] blocks of the matrix: rotation (3, in the camera) and ax, gx, ay, gy (4).
        r, k: [M,3], [M,4] downhill gradient.
    """

    cost: Tensor
    rr: Tensor
    rk: Tensor
    kk: Tensor
    r: Tensor
    k: Tensor


State = TypeVar("State", Fit, Normal)


def free_intrinsics(known: bool, square_pixels: bool) -> Tensor:
    """[4,m] how the m free intrinsics move ax, gx, ay, gy."""
    if known:
        return torch.zeros(4, 0, dtype=torch.float64)
    if square_pixels:
        return torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    return torch.eye(4, dtype=torch.float64)


def refine(rays: Rays, fit: Fit, width: Tensor, free: Tensor, frames: int) -> Fit:
    """Levenberg-Marquardt on the robust angular error; `frames` consecutive ones share their intrinsics.

    A step that does not lower a group's cost is taken back and tried again with more damping.
    """
    # Frames of one group count by their own noise level; without a level (not robust) all alike.
    importance = torch.where(width.isfinite(), width**-2, 1.0).masked_fill(fit.failed, 0.0)
    best = _normal_equations(rays, fit, width, importance)
    damping = torch.full((len(width) // frames,), DAMPING_START, dtype=torch.float64, device=width.device)
    for _ in range(REFINE_ROUNDS):
        turn, step = _damped_step(best, damping, free, frames)
        candidate = replace(
            fit,
            rotations=fit.rotations @ rotation_of(turn),
            inverse_k=torch.cat([fit.inverse_k[:, :4] + step, fit.inverse_k[:, 4:]], dim=-1),
        )
        normal = _normal_equations(rays, candidate, width, importance)
        new_cost, old_cost = (torch.unflatten(cost, 0, (-1, frames)).sum(1) for cost in (normal.cost, best.cost))
        better = (new_cost < old_cost) & _all_in_group(plausible(candidate.inverse_k) | fit.failed, frames)
        if free.shape[1] == 0:
            better = new_cost < old_cost
        damping = torch.where(better, damping / 10, damping * 10).clamp(DAMPING_MIN, DAMPING_MAX)
        chosen = better.repeat_interleave(frames)
        fit, best = _select(chosen, candidate, fit), _select(chosen, normal, best)
    return fit


def _all_in_group(flags: Tensor, frames: int) -> Tensor:
    return torch.unflatten(flags, 0, (-1, frames)).all(dim=1)


def _select(chosen: Tensor, yes: State, no: State) -> State:
    """Per frame one of two states of the same kind."""
    fields = {
        name: torch.where(chosen.reshape(-1, *[1] * (value.dim() - 1)), value, getattr(no, name))
        for name, value in vars(yes).items()
    }
    return type(yes)(**fields)


def _normal_equations(rays: Rays, fit: Fit, width: Tensor, importance: Tensor) -> Normal:
    """With q the observed direction in the camera and c the fitted one, the error is e = Exp(-turn) q - c."""
    observed = rays.directions @ fit.rotations
    ray = camera_rays(fit.inverse_k, rays.points)
    length = ray.norm(dim=-1, keepdim=True)
    fitted = ray / length
    error = observed - fitted
    squares = error.square().sum(-1)
    spread = 1 + squares / width[:, None] ** 2
    weights = importance[:, None] * rays.weights / spread**2
    cost = (importance[:, None] * rays.weights * squares / spread).sum(-1)

    # Columns of (I - c c^T) / |ray|: how the unit direction follows a change of the ray's x and y.
    unit_x, unit_y = torch.eye(3, dtype=torch.float64, device=width.device)[:2]
    by_x = (unit_x - fitted * fitted[..., :1]) / length
    by_y = (unit_y - fitted * fitted[..., 1:2]) / length
    x, y = rays.points[:, 0, None], rays.points[:, 1, None]
    jacobian_k = torch.stack([-x * by_x, by_x, -y * by_y, by_y], dim=-1)
    zero = torch.zeros_like(observed[..., 0])
    q0, q1, q2 = observed.unbind(-1)
    jacobian_r = torch.stack([zero, -q2, q1, q2, zero, -q0, -q1, q0, zero], dim=-1).unflatten(-1, (3, 3))

    weighted_r, weighted_k = weights[..., None, None] * jacobian_r, weights[..., None, None] * jacobian_k
    return Normal(
        cost=cost,
        rr=torch.einsum("mcei,mcej->mij", weighted_r, jacobian_r),
        rk=torch.einsum("mcei,mcej->mij", weighted_r, jacobian_k),
        kk=torch.einsum("mcei,mcej->mij", weighted_k, jacobian_k),
        r=-torch.einsum("mcei,mce->mi", weighted_r, error),
        k=-torch.einsum("mcei,mce->mi", weighted_k, error),
    )


def _damped_step(normal: Normal, damping: Tensor, free: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Marquardt's step: turns [M,3] and changes of ax, gx, ay, gy [M,4], equal within a group."""
    per_frame = damping.repeat_interleave(frames)
    rr = _damped(normal.rr, per_frame)
    rk = normal.rk @ free
    by_k = torch.linalg.solve_ex(rr, rk).result
    by_r = torch.linalg.solve_ex(rr, normal.r[..., None]).result
    kk = _group_sum(free.mT @ normal.kk @ free, frames)
    reduced = _damped(kk, damping) - _group_sum(rk.mT @ by_k, frames)
    target = _group_sum(free.mT @ normal.k[..., None] - rk.mT @ by_r, frames)
    change = torch.linalg.solve_ex(reduced, target).result.repeat_interleave(frames, dim=0)
    return (by_r - by_k @ change).squeeze(-1), (free @ change).squeeze(-1)


def _group_sum(values: Tensor, frames: int) -> Tensor:
    return torch.unflatten(values, 0, (-1, frames)).sum(1)


def _damped(matrix: Tensor, damping: Tensor) -> Tensor:
    """Each diagonal entry grows by a share of itself; one of zero, of a frame without weight, becomes 1."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return matrix + torch.diag_embed(torch.where(diagonal == 0, 1.0, diagonal * damping[:, None]))


def rotation_of(turn: Tensor) -> Tensor:
    """[M,3] axis times angle -> [M,3,3], by way of the unit quaternion (1, turn/2) normalised: exact to third order,
    always a rotation, and the step is only a proposal."""
    quaternion = torch.cat([torch.ones_like(turn[:, :1]), turn / 2], dim=-1)
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
