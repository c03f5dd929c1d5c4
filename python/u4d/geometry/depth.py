"""Depth: which pixels count, the clip's scale, and the channel that the model sees (spec, section 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d.errors import UserError

# Decoded channels may overshoot [-1, 1]. Within these limits the inverse is exact; beyond them depth stays positive and
# finite: from 5e-6 to about 2e4 times the scale.
CHANNEL_NEAR = 1.0 - 1e-5
CHANNEL_FAR = -1.0 + 1e-4

STATIC_EXTENT = 1e-6  # a camera path shorter than this has no length to measure with


def valid_depth(depth: Tensor) -> Tensor:
    """Mask [...] of pixels that hold a depth: finite and positive."""
    return torch.isfinite(depth) & (depth > 0)


def depth_to_channel(depth: Tensor, scale: Tensor | float) -> Tensor:
    """The model's depth channel `D~ = 2 / (1 + D/s) - 1`: near is +1, the scale itself 0, infinity -1.

    Args:
        depth: [..., N, H, W], metres (or any unit), every pixel valid: call `fill_invalid` first.
        scale: a number, or a tensor of one scale per clip that matches depth's leading dimensions ([B] for [B,N,H,W]).
    Returns:
        [..., N, H, W] in [-1, 1].
    Raises:
        UserError: a scale that is not finite and positive.
    """
    return 2 / (1 + depth / _spread(scale, depth)) - 1


def channel_to_depth(channel: Tensor, scale: Tensor | float) -> Tensor:
    """Exact inverse of `depth_to_channel`, clamped so that an overshooting decoder still gives positive, finite depth.

    Args:
        channel: [..., N, H, W], nominally in [-1, 1].
        scale: as for `depth_to_channel`.
    Returns:
        [..., N, H, W] depth in the unit of `scale`, between 5e-6 and 2e4 scales.
    """
    clamped = channel.clamp(CHANNEL_FAR, CHANNEL_NEAR)
    return _spread(scale, channel) * ((1 - clamped) / (1 + clamped))


def fill_invalid(depth: Tensor) -> Tensor:
    """Replace invalid pixels (0, negative, NaN, infinity) by the farthest valid depth of their clip.

    Args:
        depth: [..., N, H, W]; the last three dimensions are one clip.
    Returns:
        The same shape, all positive and finite.
    Raises:
        UserError: wrong shape, or a clip without a single valid pixel.
    """
    if depth.ndim < 3:
        raise UserError(f"depth: expected [..., N, H, W], got {list(depth.shape)}")
    valid = valid_depth(depth)
    if not bool(valid.flatten(-3).any(-1).all()):
        raise UserError("depth: expected at least one valid pixel (finite and positive) per clip, got a clip with none")
    farthest = torch.where(valid, depth, torch.zeros_like(depth)).amax((-3, -2, -1), keepdim=True)
    return torch.where(valid, depth, farthest)


def clip_scale(depth: Tensor | None = None, cam_to_world: Tensor | None = None) -> float:
    """The clip's scale `s`, metres per unit, from what is observed (spec, section 1). Pass only observed things.

    1. The median of the valid observed depths, if there is any.
    2. Else the largest distance of an observed camera centre from the first one, if the camera moves (more than 1e-6).
    3. Else 1: nothing is known and the outputs are relative.

    Args:
        depth: any shape, observed frames of one clip; 0, negative, NaN and infinity are passed over.
        cam_to_world: [N, 4, 4], the observed cameras of one clip.
    Raises:
        UserError: cameras of another shape, or camera centres that are not finite.
    """
    if depth is not None:
        values = depth[valid_depth(depth)].double()
        if values.numel():
            # torch.median takes the lower of the two middle values; the upper is the negative's.
            return float((values.median() - (-values).median()) / 2)
    if cam_to_world is not None and cam_to_world.numel():
        if cam_to_world.ndim != 3 or cam_to_world.shape[-2:] != (4, 4):
            raise UserError(f"cam_to_world: expected [N, 4, 4], got {list(cam_to_world.shape)}")
        centres = cam_to_world[:, :3, 3].double()
        if not torch.isfinite(centres).all():
            raise UserError("cam_to_world: expected finite camera centres, got NaN or infinity")
        extent = float(torch.linalg.vector_norm(centres - centres[:1], dim=-1).max())
        if extent > STATIC_EXTENT:
            return extent
    return 1.0


def _spread(scale: Tensor | float, like: Tensor) -> Tensor | float:
    """Give `scale` the trailing dimensions it needs to multiply `like`; refuse scales that would destroy the depth."""
    if not isinstance(scale, Tensor):
        if not 0 < scale < float("inf"):
            raise UserError(f"scale: expected a finite positive number, got {scale}")
        return scale
    if scale.ndim > like.ndim or any(a not in (1, b) for a, b in zip(scale.shape, like.shape, strict=False)):
        raise UserError(f"scale: expected one per clip to match {list(like.shape)}, got {list(scale.shape)}")
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise UserError(f"scale: expected finite positive numbers, got {scale.flatten()[:4].tolist()}")
    return scale.to(like).reshape(*scale.shape, *[1] * (like.ndim - scale.ndim))
