"""Wan2.1's VAE, diffusers' `AutoencoderKLWan`, as a codec: stride 4x8x8, 16 channels, for RGB and depth.

The VAE is causal and takes 1 + 4k frames. Frames 0..N-2 are one such clip, its last group filled by repeating its last
frame; the last frame is an image of its own. So the first and the last latent frame depend on their one frame alone,
as the time layout promises. Source: spec.md section 1. Latents are not normalised here (see model/latents.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from u4d.errors import UserError
from u4d.model.codec import CELL, TinyCodec, check_clip, check_stream
from u4d.model.latents import Codec
from u4d.model.wan_vae_parts import wan_vae_kept
from u4d.model.wan_vae_pass import decode_clip, encode_clip
from u4d_fast.time_layout import FRAMES_PER_GROUP, frame_groups, latent_frames

LATENT_CHANNELS = 16
RGB_CHANNELS = 3
TILE_ABOVE = 480 * 832

FITTING = {
    "z_dim": LATENT_CHANNELS,
    "in_channels": RGB_CHANNELS,
    "out_channels": RGB_CHANNELS,
    "patch_size": None,
    "is_residual": False,
    "scale_factor_temporal": FRAMES_PER_GROUP,
    "scale_factor_spatial": CELL,
}


@dataclass(frozen=True, eq=False)
class WanCodec:
    """Clips in [-1,1] <-> latents, one clip at a time, so that memory does not grow with the batch.

    A picture of more than `tile_above` pixels is also cut into overlapping tiles (diffusers' own: 256 pixels wide and
    high, 64 shared, blended). Memory is then bounded (decoding 480x832 in float32: 1.2 GB of activations, not 7), but
    values change: convolutions see no further than a tile's edge, and attention only what is in the tile. With random
    weights and 240x320 the latents differ by 12 % of their deviation and the images by 16 %, mostly near the seams. So
    tiles are off up to Wan's own size, 480x832. With `tile_above=0` or `vae.enable_tiling()`, which also sets their
    sizes, they are on wherever a picture is larger than one tile.

    A clip goes through the VAE's weights in chunks of many latent frames (`wan_vae_pass`), which computes what
    diffusers does frame by frame. Where something of the VAE was replaced or hooked to, and in tiles, diffusers' own
    passes run (`kept` says why); then the VAE keeps earlier frames in itself while it works: one call at a time.

    Attributes:
        vae: with 16 channels and stride 4x8x8, see `as_codec`.
        tile_above: pixels of the largest picture that is not tiled.
        in_chunks: False: diffusers' own passes run in any case.
    """

    vae: AutoencoderKLWan
    tile_above: int = TILE_ABOVE
    in_chunks: bool = True

    @property
    def device(self) -> torch.device:
        """Where the VAE's weights are."""
        return self.vae.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the VAE's weights, in which it computes."""
        return self.vae.dtype

    @property
    def kept(self) -> str:
        """Why diffusers' own passes run for pictures that are not tiled; empty where ours do."""
        return wan_vae_kept(self.vae)

    def encode(self, clip: Tensor, stream: str) -> Tensor:
        """`[B,N,C,H,W]` in [-1,1] -> `[B,16,F,H/8,W/8]`, the posterior's mode; stream is "rgb" (C=3) or "depth" (C=1).

        Depth goes in as three equal channels.

        Raises:
            ValueError: another stream, channel count, or a size that is no multiple of 8.
        """
        check_clip(clip, stream)
        groups = frame_groups(clip.shape[1]).to(clip.device)
        causal = torch.cat((groups[0, :1], groups[1:-1].flatten()))
        encoded = []
        with self._ready(clip.shape[3] * clip.shape[4]) as kept:
            for one in clip.split(1):
                parts = [one[:, causal]] if len(groups) == 1 else [one[:, causal], one[:, -1:]]
                encoded.append(torch.cat([self._encode_causal(part, kept) for part in parts], dim=2))
        return torch.cat(encoded)

    def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor:
        """`[B,16,F,h,w]` -> `[B,N,C,8h,8w]` in [-1,1]; the repeats of a group that N does not fill are dropped.

        Depth is the mean of the three decoded channels.

        Raises:
            ValueError: another stream, or F is not that of `num_frames` frames.
        """
        check_latents(latents, stream, num_frames)
        decoded = []
        with self._ready(latents.shape[3] * latents.shape[4] * CELL**2) as kept:
            for one in latents.split(1):
                if num_frames == 1:
                    images = self._decode_causal(one, kept)
                else:
                    clip, last = (self._decode_causal(part, kept) for part in (one[:, :, :-1], one[:, :, -1:]))
                    images = torch.cat((clip[:, : num_frames - 1], last), dim=1)
                decoded.append(images if stream == "rgb" else images.mean(dim=2, keepdim=True))
        return torch.cat(decoded)

    def _encode_causal(self, frames: Tensor, kept: bool) -> Tensor:
        """`[1,1+4k,C,H,W]` -> `[1,16,1+k,h,w]`, in the dtype of the frames; by diffusers' own pass if it is kept."""
        images = frames.to(self.dtype).expand(-1, -1, RGB_CHANNELS, -1, -1).transpose(1, 2)
        latents: Tensor
        if kept:
            latents = self.vae.encode(images).latent_dist.mode()
        else:
            latents, _ = encode_clip(self.vae, images).chunk(2, dim=1)  # the mode is the mean
        return latents.to(frames.dtype)

    def _decode_causal(self, latents: Tensor, kept: bool) -> Tensor:
        """`[1,16,1+k,h,w]` -> `[1,1+4k,3,H,W]`, in the dtype of the latents; by diffusers' own pass if it is kept."""
        given = latents.to(self.dtype)
        images: Tensor = self.vae.decode(given).sample if kept else decode_clip(self.vae, given)
        return images.transpose(1, 2).to(latents.dtype)

    @contextmanager
    def _ready(self, pixels: int) -> Iterator[bool]:
        """The VAE set to tile or not, and whether its own passes are to run.

        Afterwards it is as it was, and without remembered frames, whatever happened.

        diffusers forgets them at the start of every call, so an exception does no harm to later results; but until
        then they hold memory, just when it may have run out.
        """
        asked = self.vae.use_tiling
        self.vae.use_tiling = asked or pixels > self.tile_above
        try:
            yield not self.in_chunks or bool(self.kept)
        finally:
            self.vae.use_tiling = asked
            self.vae.clear_cache()


def as_codec(vae: ModelMixin | WanCodec) -> Codec:
    """What codes a checkpoint's images: its `TinyCodec`, or Wan's VAE wrapped.

    Raises:
        UserError: a component of another class, or a variant of Wan's VAE with other latents (such as Wan2.2's).
    """
    if isinstance(vae, TinyCodec | WanCodec):
        return vae
    if not isinstance(vae, AutoencoderKLWan):
        raise UserError(
            f"vae: expected TinyCodec or AutoencoderKLWan, got {type(vae).__name__}: its latents are not those that "
            "the transformer knows; use the vae folder of the checkpoint that the weights came from"
        )
    check_fitting(vae.config)
    return WanCodec(vae)


def check_fitting(config: Any) -> None:
    """Raise UserError unless that is a configuration of Wan2.1's VAE, of any width."""
    for name, wanted in FITTING.items():
        if config[name] != wanted:
            refuse_variant(name, wanted, config[name])
    factors = 2 ** sum(config["temperal_downsample"]), 2 ** (len(config["dim_mult"]) - 1)
    if factors != (FRAMES_PER_GROUP, CELL):
        refuse_variant("strides in time and space", (FRAMES_PER_GROUP, CELL), factors)


def refuse_variant(name: str, wanted: object, got: object) -> None:
    """Raise UserError about one field of the VAE's configuration."""
    raise UserError(
        f"vae: expected an AutoencoderKLWan with {name} = {wanted!r}, got {got!r}; only Wan2.1's VAE fits (Wan2.2's "
        "has other latents): use the vae folder of Wan2.1"
    )


def check_latents(latents: Tensor, stream: str, num_frames: int) -> None:
    """Raise ValueError unless those are latents `[B,16,F,h,w]` of that many frames."""
    check_stream(stream)
    total = latent_frames(num_frames)
    if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"latents: expected [B,{LATENT_CHANNELS},{total},h,w], got {list(latents.shape)}")
    if latents.shape[2] != total:
        raise ValueError(f"latents: expected F = {total} for {num_frames} frames, got {latents.shape[2]}")
