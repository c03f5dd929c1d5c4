"""Packed Plücker ray latents to one ray map per frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_match, check_shape, geometry_dtype
from u4d_fast.reference.pack_rays import RAY_CHANNELS
from u4d_fast.reference.unpack_rays import unpack_rays as reference_unpack_rays
from u4d_fast.time_layout import FRAMES_PER_GROUP, frame_groups, latent_frames


def unpack_rays(
    ray_dir: Tensor,
    ray_moment: Tensor,
    num_frames: int,
    scale: Tensor,
    *,
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Read one ray map per frame out of packed ray latents: the inverse of `pack_rays`.

    Where the time layout repeats a frame (the first, the last, and the last of a group that is not full), its copies
    are averaged. Directions are not made unit again, so that noise keeps its statistics.

    Differentiable in ray_dir, ray_moment and scale.

    Args:
        ray_dir: [B,16,F,h,w] as `pack_rays` writes it; channels 12..15 are not read.
        ray_moment: [B,16,F,h,w].
        num_frames: N, frames of the clip.
        scale: [B]; the moments are multiplied by it, and so are in its unit (metres).
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        directions and moments, each [B,N,3,h,w]. float64 in, float64 out (by the reference); half precision is
        computed and returned in float32.
    Raises:
        ValueError: shapes disagree, or F is not the number of latent frames of N frames, or the backend can't be had.
        TypeError: a dtype is not floating.
    """
    check_shape("ray_dir", ray_dir, ("B", RAY_CHANNELS, "F", "h", "w"))
    batch, _, latents, rows, columns = ray_dir.shape
    check_match("ray_moment", ray_moment, (batch, RAY_CHANNELS, latents, rows, columns), "ray_dir", ray_dir)
    check_shape("scale", scale, ("B",))
    check_match("scale", scale, (batch,), "ray_dir", ray_dir)
    check_floating(ray_dir=ray_dir, ray_moment=ray_moment, scale=scale)
    if latent_frames(num_frames) != latents:
        raise ValueError(
            f"ray_dir: expected {latent_frames(num_frames)} latent frames for num_frames={num_frames}, got {latents}"
        )
    dtype = geometry_dtype(ray_dir, ray_moment, scale)
    ray_dir, ray_moment, scale = ray_dir.to(dtype), ray_moment.to(dtype), scale.to(dtype)
    if backends.resolve("unpack_rays", backend, ray_dir, ray_moment, scale) == "reference":
        return reference_unpack_rays(ray_dir, ray_moment, num_frames, scale)
    directions, moments = _launch(ray_dir, ray_moment, scale, num_frames)
    return directions, moments


def _outputs(ray_dir: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    shape = (ray_dir.shape[0], num_frames, 3, *ray_dir.shape[3:])
    return ray_dir.new_empty(shape), ray_dir.new_empty(shape)


def _kernel(ray_dir: Tensor, ray_moment: Tensor, scale: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    ray_dir, ray_moment, scale = ray_dir.contiguous(), ray_moment.contiguous(), scale.contiguous()
    directions, moments = _outputs(ray_dir, num_frames)
    batch, _, latents, rows, columns = ray_dir.shape
    backends.call(
        "unpack_rays",
        ray_dir.device,
        *(tensor.data_ptr() for tensor in (ray_dir, ray_moment, scale, directions, moments)),
        *(batch, num_frames, latents, rows, columns),
    )
    return directions, moments


def _reference(ray_dir: Tensor, ray_moment: Tensor, scale: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    return reference_unpack_rays(ray_dir, ray_moment, num_frames, scale)


def _fake(ray_dir: Tensor, ray_moment: Tensor, scale: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    return _outputs(ray_dir, num_frames)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ray_dir, ray_moment, scale, ctx.num_frames = inputs
    ctx.latents = ray_dir.shape[2]
    ctx.save_for_backward(ray_moment, scale)


def _backward(ctx: Any, grad_directions: Tensor, grad_moments: Tensor) -> tuple[Tensor | None, ...]:
    ray_moment, scale = ctx.saved_tensors
    unscaled, _ = reference_unpack_rays(ray_moment, ray_moment, ctx.num_frames, scale)
    grad_scale = (grad_moments * unscaled).sum((1, 2, 3, 4))
    factor = scale[:, None, None, None, None]
    return (
        _spread(grad_directions, ctx.num_frames, ctx.latents),
        _spread(grad_moments * factor, ctx.num_frames, ctx.latents),
        grad_scale,
        None,
    )


def _spread(grad: Tensor, frames: int, latents: int) -> Tensor:
    """[B,N,3,h,w] -> [B,16,F,h,w]: each copy of a frame gets its share, the transpose of averaging."""
    groups = frame_groups(frames).flatten().to(grad.device)
    copies = groups.bincount(minlength=frames).to(grad.dtype)
    slots = (grad / copies[:, None, None, None])[:, groups]
    batch, _, _, rows, columns = grad.shape
    packed = slots.reshape(batch, latents, FRAMES_PER_GROUP * 3, rows, columns).transpose(1, 2)
    empty = packed.new_zeros(batch, RAY_CHANNELS - packed.shape[1], latents, rows, columns)
    return torch.cat([packed, empty], dim=1)


_launch = backends.register(
    "unpack_rays",
    "(Tensor ray_dir, Tensor ray_moment, Tensor scale, SymInt num_frames) -> (Tensor, Tensor)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
