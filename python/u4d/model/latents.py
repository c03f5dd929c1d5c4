"""Streams <-> the normalised latents `[B,4,16,F,h,w]` that the transformer works on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import u4d_fast
from u4d.diffusion.flow import RAY_CHANNELS
from u4d.geometry.cameras import fov_to_intrinsics
from u4d.model.streams import Streams
from u4d.presets import RAY_BASES
from u4d_fast.time_layout import FRAMES_PER_GROUP

CELL = 8


class Codec(Protocol):
    """What is asked of any image codec: `tiny`'s own or Wan's VAE."""

    def encode(self, clip: Tensor, stream: str) -> Tensor: ...

    def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor: ...


@dataclass(frozen=True)
class Statistics:
    """Per stream and channel mean and deviation, and the camera whose rays are subtracted from `ray_dir`.

    Attributes:
        mean, std: `[4,16]`, of the latents in `ray_basis`.
        reference_fov_rad: horizontal field of view of the reference camera (square pixels, identity rotation).
        ray_basis: what the four frames packed into a ray latent stand as, see `ray_basis_matrix`.
    """

    mean: Tensor
    std: Tensor
    reference_fov_rad: float
    ray_basis: str = "frames"


def encode_streams(streams: Streams, codec: Codec, statistics: Statistics) -> Tensor:
    """Streams -> `[B,4,16,F,h,w]`, about unit variance per stream and channel; a missing stream is all zero.

    Raises:
        ValueError: no stream is given.
    """
    basis = ray_basis_matrix(statistics.ray_basis)
    directions = streams.ray_dir
    if directions is not None:
        directions = directions - reference_rays(directions, statistics)
    parts = (
        None if streams.rgb is None else codec.encode(streams.rgb, "rgb"),
        None if streams.depth is None else codec.encode(streams.depth, "depth"),
        None if directions is None else change_frames(directions, basis),
        None if streams.ray_moment is None else change_frames(streams.ray_moment, basis),
    )
    known = next((part for part in parts if part is not None), None)
    if known is None:
        raise ValueError("streams: expected at least one of rgb, depth and rays, got none")
    mean, std = broadcast(statistics, known)
    stacked = [
        torch.zeros_like(known) if part is None else (part - mean[index]) / std[index]
        for index, part in enumerate(parts)
    ]
    return torch.stack(stacked, dim=1)


def decode_latents(latents: Tensor, codec: Codec, statistics: Statistics, num_frames: int) -> Streams:
    """Exact inverse of the normalisation, then the codec's decoder."""
    inverse = ray_basis_matrix(statistics.ray_basis).mT
    mean, std = broadcast(statistics, latents)
    rgb, depth, ray_dir, ray_moment = (latents[:, index] * std[index] + mean[index] for index in range(4))
    return Streams(
        rgb=codec.decode(rgb, "rgb", num_frames),
        depth=codec.decode(depth, "depth", num_frames),
        ray_dir=change_frames(ray_dir, inverse) + reference_rays(ray_dir, statistics),
        ray_moment=change_frames(ray_moment, inverse),
    )


def ray_basis_matrix(name: str) -> Tensor:
    """Orthonormal `[4,4]`: rows are what a ray latent holds of its four frames.

    "frames": the frames themselves, the seed's packing. All four nearly agree, so normalised channel by channel a model
    gains little by telling them apart, and its cameras move in steps of four frames. "dct": the discrete cosine
    transform (DCT-II) over the frames: their mean, then how they change, each of which is brought to unit variance.

    Raises:
        ValueError: another name.
    """
    if name == "frames":
        return torch.eye(FRAMES_PER_GROUP)
    if name != "dct":
        raise ValueError(f"ray_basis: expected one of {', '.join(RAY_BASES)}, got {name!r}")
    order, frame = torch.arange(FRAMES_PER_GROUP)[:, None], torch.arange(FRAMES_PER_GROUP)
    cosines = torch.cos(math.pi * order * (frame + 0.5) / FRAMES_PER_GROUP)
    return cosines / cosines.norm(dim=1, keepdim=True)


def change_frames(rays: Tensor, matrix: Tensor) -> Tensor:
    """Packed rays `[B,16,F,h,w]` with a `[4,4]` matrix applied over their four frames; the empty channels stay."""
    packed, empty = rays.split((RAY_CHANNELS, rays.shape[1] - RAY_CHANNELS), dim=1)
    changed = torch.einsum("ij,bjcfhw->bicfhw", matrix.to(rays), packed.unflatten(1, (FRAMES_PER_GROUP, -1)))
    return torch.cat((changed.flatten(1, 2), empty), dim=1)


def reference_rays(like: Tensor, statistics: Statistics) -> Tensor:
    """Packed ray directions `[1,16,1,h,w]` of the reference camera for latents `[B,16,F,h,w]`."""
    size = (like.shape[-2] * CELL, like.shape[-1] * CELL)
    intrinsics = fov_to_intrinsics(statistics.reference_fov_rad, size).to(like)
    identity = torch.eye(4).to(like)
    return u4d_fast.pack_rays(intrinsics[None, None], identity[None, None], like.new_ones(1), size)[0]


def broadcast(statistics: Statistics, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation as `[4,16,1,1,1]` on the device and in the dtype of `like`."""
    mean, std = statistics.mean.to(like), statistics.std.to(like)
    return mean[..., None, None, None], std[..., None, None, None]
