"""The codec of the `tiny` preset: stride 4x8x8, 16 channels, for RGB and for the depth channel.

Each latent frame is coded on its own from its frames alone (one for the first and the last, four otherwise), so a
latent depends on nothing outside its group and any number of frames works. A linear map per 8x8 cell (started as
PCA) carries most of the signal; a small convolutional branch that sees neighbouring cells adds what it can't.
The same methods are what the pipeline asks of any codec, Wan's VAE included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import gelu, pixel_shuffle, pixel_unshuffle

from u4d.presets import CodecConfig, read_config
from u4d_fast.time_layout import FRAMES_PER_GROUP, frame_groups, latent_frames

CELL = 8
IMAGE_CHANNELS = {"rgb": 3, "depth": 1}


class TinyCodec(ModelMixin, ConfigMixin):
    """Clips in [-1,1] <-> latents, one pair of networks per stream and group length.

    Args:
        latent_channels: channels of a latent.
        hidden, decoder_hidden: widths of the convolutional branches.
        depth: number of residual blocks in each branch.
    """

    def __init__(self, latent_channels: int = 16, hidden: int = 96, decoder_hidden: int = 160, depth: int = 2) -> None:
        super().__init__()
        self.register_to_config(
            latent_channels=latent_channels, hidden=hidden, decoder_hidden=decoder_hidden, depth=depth
        )
        sizes = (latent_channels, hidden, decoder_hidden, depth)
        self.coders = nn.ModuleDict(
            {
                coder_name(stream, frames): FrameCoder(channels * frames * CELL**2, *sizes)
                for stream, channels in IMAGE_CHANNELS.items()
                for frames in (1, FRAMES_PER_GROUP)
            }
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> TinyCodec:
        """Build from a saved configuration (`config.json`), as diffusers does when it loads a checkpoint.

        Raises:
            UserError: a field that this version does not know, or a value that makes no sense.
        """
        return cls(**asdict(read_config(CodecConfig, {**config, **overrides})))

    def encode(self, clip: Tensor, stream: str) -> Tensor:
        """`[B,N,C,H,W]` in [-1,1] -> `[B,16,F,H/8,W/8]`; stream is "rgb" (C=3) or "depth" (C=1).

        Raises:
            ValueError: another stream, channel count, or a size that is no multiple of 8.
        """
        check_clip(clip, stream)
        groups = frame_groups(clip.shape[1]).to(clip.device)
        ends = [0] if len(groups) == 1 else [0, -1]
        latents = clip.new_empty(
            clip.shape[0], len(groups), self.config.latent_channels, clip.shape[3] // CELL, clip.shape[4] // CELL
        )
        latents[:, ends] = self.encode_groups(clip[:, groups[ends, :1]], stream)
        if len(groups) > 2:
            latents[:, 1:-1] = self.encode_groups(clip[:, groups[1:-1]], stream)
        return latents.transpose(1, 2)

    def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor:
        """`[B,16,F,h,w]` -> `[B,N,C,8h,8w]` in [-1,1]; the repeats of a group that N does not fill are dropped.

        Raises:
            ValueError: another stream, or F is not that of `num_frames` frames.
        """
        check_stream(stream)
        total = latent_frames(num_frames)
        if latents.shape[2] != total:
            raise ValueError(f"latents: expected F = {total} for {num_frames} frames, got {latents.shape[2]}")
        by_frame = latents.transpose(1, 2)
        ends = [0] if total == 1 else [0, -1]
        single = self.decode_groups(by_frame[:, ends], stream, 1).flatten(1, 2)
        if total <= 2:
            return single
        inner = self.decode_groups(by_frame[:, 1:-1], stream, FRAMES_PER_GROUP).flatten(1, 2)
        return torch.cat((single[:, :1], inner[:, : num_frames - 2], single[:, 1:]), dim=1)

    def coder(self, stream: str, frames: int) -> FrameCoder:
        """The pair of networks for groups of that many frames."""
        coder = self.coders[coder_name(stream, frames)]
        assert isinstance(coder, FrameCoder)
        return coder

    def encode_groups(self, frames: Tensor, stream: str) -> Tensor:
        """Groups of 1 or 4 frames `[B,G,frames,C,H,W]` -> `[B,G,16,h,w]`, in the dtype of the frames."""
        coder = self.coder(stream, frames.shape[2])
        cells = pixel_unshuffle(frames.flatten(2, 3).flatten(0, 1), CELL)
        return coder.encode(cells.to(self.dtype)).to(frames.dtype).unflatten(0, frames.shape[:2])

    def decode_groups(self, latents: Tensor, stream: str, frames: int) -> Tensor:
        """`[B,G,16,h,w]` -> `[B,G,frames,C,H,W]` in [-1,1], in the dtype of the latents."""
        cells = self.coder(stream, frames).decode(latents.flatten(0, 1).to(self.dtype))
        images = pixel_shuffle(cells.to(latents.dtype), CELL).clamp(-1, 1)
        return images.unflatten(1, (frames, -1)).unflatten(0, latents.shape[:2])


def check_clip(clip: Tensor, stream: str) -> None:
    """Raise ValueError unless that is a clip `[B,N,C,H,W]` of that stream, whole cells high and wide."""
    check_stream(stream)
    channels = IMAGE_CHANNELS[stream]
    if clip.ndim != 5 or clip.shape[2] != channels or clip.shape[3] % CELL or clip.shape[4] % CELL:
        raise ValueError(
            f"clip: expected [B,N,{channels},H,W] with H and W multiples of {CELL}, got {list(clip.shape)}"
        )


def check_stream(stream: str) -> None:
    """Raise ValueError unless the codec knows that stream: rays are packed, not coded."""
    if stream not in IMAGE_CHANNELS:
        raise ValueError(f"stream: expected one of {sorted(IMAGE_CHANNELS)}, got {stream!r}")


def coder_name(stream: str, frames: int) -> str:
    """Key of the coder for groups of that many frames."""
    return f"{stream}_{frames}"


class FrameCoder(nn.Module):
    """Encoder and decoder of one group of frames whose 8x8 cells are already stacked as channels."""

    def __init__(self, pixels: int, latent_channels: int, hidden: int, decoder_hidden: int, depth: int) -> None:
        super().__init__()
        self.analysis = nn.Conv2d(pixels, latent_channels, 1)
        self.synthesis = nn.Conv2d(latent_channels, pixels, 1)
        self.encoder = ResidualBranch(pixels, hidden, latent_channels, depth)
        self.decoder = ResidualBranch(latent_channels, decoder_hidden, pixels, depth)

    def encode(self, cells: Tensor) -> Tensor:
        """`[G,pixels,h,w]` -> `[G,16,h,w]`."""
        return self.analysis(cells) + self.encoder(cells)

    def decode(self, latents: Tensor) -> Tensor:
        """`[G,16,h,w]` -> `[G,pixels,h,w]`."""
        return self.synthesis(latents) + self.decoder(latents)

    @torch.no_grad()
    def start_as_pca(self, cells: Tensor) -> None:
        """Set the linear maps to the whitened principal components of `[M,pixels]` samples; the branches add zero."""
        mean = cells.mean(0)
        _, singular, basis = torch.linalg.svd((cells - mean), full_matrices=False)
        basis = basis[: self.analysis.out_channels]
        deviation = (singular[: len(basis)] / len(cells) ** 0.5).clamp_min(1e-4)
        self.analysis.weight.copy_((basis / deviation[:, None])[..., None, None])
        self.analysis.get_parameter("bias").copy_(-(basis @ mean) / deviation)
        self.synthesis.weight.copy_((basis.T * deviation)[..., None, None])
        self.synthesis.get_parameter("bias").copy_(mean)


class ResidualBranch(nn.Module):
    """1x1 in, residual 3x3 blocks over neighbouring cells, 1x1 out that starts at zero."""

    def __init__(self, channels_in: int, hidden: int, channels_out: int, depth: int) -> None:
        super().__init__()
        self.project_in = nn.Conv2d(channels_in, hidden, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, hidden, 1))
            for _ in range(depth)
        )
        self.project_out = nn.Conv2d(hidden, channels_out, 1)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for block in self.blocks:
            x = x + block(x)
        return self.project_out(gelu(x))
