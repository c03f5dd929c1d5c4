"""The similarity that brings one set of points closest to another."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d.errors import UserError


def umeyama(source: Tensor, target: Tensor, with_scale: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares similarity with `target ~ s R source + t` (Umeyama, PAMI 1991, eqs. 38-43).

    Always gives a proper rotation and finite numbers. Where the points leave something open it stays a minimiser:
    points on a line leave the turn about the line open; a source that is one single point leaves scale and rotation
    open, and the scale is then 1.

    Args:
        source: [..., P, 3], P >= 1, finite.
        target: [..., P, 3], same shape.
        with_scale: False fixes s = 1 (a rigid motion).
    Returns:
        (s [...], R [..., 3, 3], t [..., 3]) in float64 on the source's device.
    Raises:
        UserError: shapes disagree, no points, or points that are not finite.
    """
    if source.shape != target.shape or source.ndim < 2 or source.shape[-1] != 3 or source.shape[-2] == 0:
        raise UserError(
            f"source, target: expected the same shape [..., P, 3] with P >= 1, got {list(source.shape)} "
            f"and {list(target.shape)}"
        )
    if not bool(torch.isfinite(source).all() and torch.isfinite(target).all()):
        raise UserError("source, target: expected finite points, got NaN or infinity")
    source, target = source.double(), target.double()
    source_mean, target_mean = source.mean(-2), target.mean(-2)
    source_offset, target_offset = source - source_mean[..., None, :], target - target_mean[..., None, :]
    variance = source_offset.square().sum((-2, -1)) / source.shape[-2]
    covariance = target_offset.mT @ source_offset / source.shape[-2]
    u, singular, vh = torch.linalg.svd(covariance)
    signs = torch.ones_like(singular)
    signs[..., 2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation = (u * signs[..., None, :]) @ vh
    scale = torch.ones_like(variance)
    if with_scale:
        # Rounding leaves a still source with a variance near eps^2 of its distance; dividing by that would be noise.
        still = variance <= 1e-24 * (1 + source_mean.square().sum(-1))
        ratio = (singular * signs).sum(-1) / torch.where(still, torch.ones_like(variance), variance)
        scale = torch.where(still, scale, ratio)
    translation = target_mean - scale[..., None] * (rotation @ source_mean[..., None]).squeeze(-1)
    return scale, rotation, translation


def nearest_rotation(matrices: Tensor) -> Tensor:
    """The rotations [..., 3, 3] closest to the given matrices (Frobenius norm); of a mean, the chordal mean."""
    u, _, vh = torch.linalg.svd(matrices.double())
    signs = torch.ones_like(u[..., 0])
    signs[..., 2] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation: Tensor = (u * signs[..., None, :]) @ vh
    return rotation.to(matrices.dtype)
