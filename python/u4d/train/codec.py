"""Training of the tiny codec, and the statistics that bring its latents to unit variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, pixel_unshuffle

from u4d.clips import Clips
from u4d.diffusion.flow import LATENT_CHANNELS, RAY_CHANNELS
from u4d.errors import UserError
from u4d.geometry.cameras import relative_to_first
from u4d.model.codec import CELL, IMAGE_CHANNELS, TinyCodec, coder_name
from u4d.model.latents import Codec, Statistics, encode_streams
from u4d.model.motion import MotionFeatures
from u4d.model.streams import Streams, observed_scale, to_streams
from u4d.train.data.sources import render_window
from u4d.train.recipe import Recipe
from u4d_fast.time_layout import FRAMES_PER_GROUP, frame_groups

GREY = torch.tensor([0.299, 0.587, 0.114])
DEVIATION_FLOOR = 0.025  # of a stream's largest deviation: a channel that hardly varies is not blown up
REUSE = 8  # steps on one rendered window


def train_codec(recipe: Recipe, report: Callable[[int, dict[str, float]], None]) -> TinyCodec:
    """Start as PCA, then minimise the squared error of RGB and of the depth channel.

    Raises:
        UserError: the preset has no codec of its own.
    """
    config, size = recipe.preset.codec, recipe.preset.transformer.image_size
    torch.manual_seed(recipe.seed)
    if config is None:
        raise UserError(f"preset: expected one with a codec of its own, got {recipe.preset.name!r}")
    codec = TinyCodec(**asdict(config))
    frames = recipe.preset.transformer.num_frames
    first = images_of(render_window(range(recipe.codec.pca_clips), frames, size))
    for stream in IMAGE_CHANNELS:
        for length in (1, FRAMES_PER_GROUP):
            groups = image_groups(first, stream, length)
            cells = pixel_unshuffle(groups.flatten(1, 2), CELL).permute(0, 2, 3, 1).flatten(0, 2)
            picked = torch.randperm(len(cells))[:20000]
            codec.coder(stream, length).start_as_pca(cells[picked])
    optimizer = torch.optim.AdamW(codec.parameters(), lr=recipe.codec.lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(recipe.codec.steps):
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.codec.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.codec.lr * rate
        if step % REUSE == 0:
            start = recipe.codec.pca_clips + step // REUSE * recipe.codec.window
            window = images_of(render_window(range(start, start + recipe.codec.window), 6, size))
        assert window.rgb is not None and window.depth is not None
        picked = torch.randperm(recipe.codec.window)[: recipe.codec.clips_per_step]
        errors = reconstruction_errors(codec, Streams(rgb=window.rgb[picked], depth=window.depth[picked]))
        optimizer.zero_grad(set_to_none=True)
        # The logarithm gives a decibel of every coder the same weight, whatever its level.
        torch.stack([error.log() for error in errors.values()]).sum().backward()
        optimizer.step()
        report(step, {name: psnr(float(error.detach())) for name, error in errors.items()})
    codec.eval()
    return codec


def images_of(clips: Clips) -> Streams:
    """RGB and depth streams alone: no cameras, no rays."""
    return streams_of(Clips(rgb=clips.rgb, depth=clips.depth))


def streams_of(clips: Clips) -> Streams:
    """All streams of the clips, scaled by their median depth."""
    assert clips.rgb is not None
    batch, frames, _, height, width = clips.rgb.shape
    groups = frame_groups(frames)
    context = torch.zeros(batch, 4, len(groups), dtype=torch.bool)
    return to_streams(clips, observed_scale(clips, context, groups), (height, width))


def image_groups(streams: Streams, stream: str, length: int) -> Tensor:
    """All groups of one kind: `[M,length,C,H,W]`."""
    clip: Tensor = getattr(streams, stream)
    groups = frame_groups(clip.shape[1])
    picked = groups[[0, -1], :1] if length == 1 else groups[1:-1]
    return clip[:, picked].flatten(0, 1)


def reconstruction_errors(codec: TinyCodec, streams: Streams) -> dict[str, Tensor]:
    """Mean squared error in [-1,1] of every coder, by name."""
    errors = {}
    for stream in IMAGE_CHANNELS:
        for length in (1, FRAMES_PER_GROUP):
            groups = image_groups(streams, stream, length)[None]
            errors[coder_name(stream, length)] = mse_loss(
                codec.decode_groups(codec.encode_groups(groups, stream), stream, length), groups
            )
    return errors


def psnr(error: float) -> float:
    """Decibels of a squared error of images in [-1,1]."""
    return 10 * math.log10(4 / max(error, 1e-12))


@torch.no_grad()
def measure_statistics(codec: TinyCodec, recipe: Recipe) -> tuple[Statistics, Streams]:
    """Per stream and channel mean and deviation over fresh clips; also returns those clips' streams."""
    config = recipe.preset.transformer
    clips = render_window(range(recipe.codec.statistics_clips), config.num_frames, config.image_size, split="val")
    _, _, intrinsics, cam_to_world = clips.everything()
    streams = streams_of(replace(clips, cam_to_world=relative_to_first(cam_to_world)))
    width = config.image_size[1]
    fov_rad = float((2 * torch.atan(width / 2 / intrinsics[..., 0, 0])).mean())
    unit = Statistics(torch.zeros(4, LATENT_CHANNELS), torch.ones(4, LATENT_CHANNELS), fov_rad, config.ray_basis)
    latents = encode_streams(streams, codec, unit)
    flat = latents.permute(1, 2, 0, 3, 4, 5).flatten(2)  # [4,16,M]
    mean, std = flat.mean(-1), flat.std(-1)
    std = std.maximum(DEVIATION_FLOOR * std.amax(-1, keepdim=True))
    mean[2:, RAY_CHANNELS:], std[2:, RAY_CHANNELS:] = 0, 1
    return replace(unit, mean=mean, std=std), streams


@torch.no_grad()
def fit_grey_decoders(motion: MotionFeatures, codec: TinyCodec, statistics: Statistics, streams: Streams) -> None:
    """Least-squares affine maps from normalised RGB latents to the grey pixels of their cells."""
    mean, std = statistics.mean[0, :, None, None], statistics.std[0, :, None, None]
    for length, decoder in ((1, motion.grey_single), (FRAMES_PER_GROUP, motion.grey_group)):
        groups = image_groups(streams, "rgb", length)
        latents = (codec.encode_groups(groups[None], "rgb")[0] - mean) / std
        grey = pixel_unshuffle(torch.einsum("c,mfchw->mfhw", GREY, groups), CELL)
        inputs = latents.permute(0, 2, 3, 1).flatten(0, 2)
        inputs = torch.cat((inputs, torch.ones_like(inputs[:, :1])), dim=1)
        # In float64, since the last bits of LAPACK's solution differ between processes.
        solution = torch.linalg.lstsq(inputs.double(), grey.permute(0, 2, 3, 1).flatten(0, 2).double()).solution
        decoder.copy_(solution.T)


def channel_weights(codec: Codec, statistics: Statistics) -> Tensor:
    """Loss weight `[4,16]` of each latent channel: its effect on the pixels.

    So a cell's mean outweighs its texture. All ones for Wan's VAE, whose channels' effects are not known.
    """
    weights = torch.ones(4, LATENT_CHANNELS)
    if not isinstance(codec, TinyCodec):
        return weights
    for index, stream in enumerate(IMAGE_CHANNELS):
        synthesis = codec.coder(stream, FRAMES_PER_GROUP).synthesis.weight.detach().flatten(1)
        effect = synthesis.norm(dim=0) * statistics.std[index]
        weights[index] = effect / effect.mean()
    return weights
