"""Streams <-> the normalised latents `[B,4,16,F,h,w]` that the transformer works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import u4d_fast
from u4d.geometry.cameras import fov_to_intrinsics
from u4d.model.streams import Streams

CELL = 8


class Codec(Protocol):
    """What is asked of any image codec: `tiny`'s own or Wan's VAE."""

    def encode(self, clip: Tensor, stream: str) -> Tensor: ...

    def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor: ...


@dataclass(frozen=True)
class Statistics:
    """Per stream and channel mean and deviation, and the camera whose rays are subtracted from `ray_dir`.

    Attributes:
        mean, std: `[4,16]`.
        reference_fov_rad: horizontal field of view of the reference camera (square pixels, identity rotation).
    """

    mean: Tensor
    std: Tensor
    reference_fov_rad: float


def encode_streams(streams: Streams, codec: Codec, statistics: Statistics) -> Tensor:
    """Streams -> `[B,4,16,F,h,w]`, about unit variance per stream and channel; a missing stream is all zero.

    Raises:
        ValueError: no stream is given.
    """
    parts = (
        None if streams.rgb is None else codec.encode(streams.rgb, "rgb"),
        None if streams.depth is None else codec.encode(streams.depth, "depth"),
        None if streams.ray_dir is None else streams.ray_dir - reference_rays(streams.ray_dir, statistics),
        streams.ray_moment,
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
    mean, std = broadcast(statistics, latents)
    rgb, depth, ray_dir, ray_moment = (latents[:, index] * std[index] + mean[index] for index in range(4))
    return Streams(
        rgb=codec.decode(rgb, "rgb", num_frames),
        depth=codec.decode(depth, "depth", num_frames),
        ray_dir=ray_dir + reference_rays(ray_dir, statistics),
        ray_moment=ray_moment,
    )


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
