"""One training step's loss: encode the clips, noise them as drawn, compare velocities."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from u4d.diffusion.flow import noisy_latents, velocity_target
from u4d.diffusion.losses import FlowLoss, flow_matching_loss
from u4d.model.latents import Codec, Statistics, encode_streams
from u4d.model.streams import observed_scale, to_streams
from u4d.model.transformer import Transformer
from u4d.train.data.captions import join_prompts
from u4d.train.data.samples import DEPTH, Samples
from u4d_fast.time_layout import frame_groups


def micro_batch_loss(
    model: Transformer,
    codec: Codec,
    statistics: Statistics,
    samples: Samples,
    group_counts: Tensor,
    channel_weights: Tensor,
    precision: str = "bf16",
) -> FlowLoss:
    """Flow-matching loss of a part of the global batch; the parts' losses add up to the loss of the whole.

    A stream that a clip does not have is pure noise at t = 1 for the model, and carries no loss. A clip without words
    has the null text.

    Args:
        model, codec: on the device of `channel_weights`.
        statistics: of the latents.
        samples: on the CPU; their noise may be anywhere.
        group_counts: `[4]`, supervised groups of the whole global batch.
        channel_weights: `[4,16]`.
        precision: "bf16" (products in bfloat16) or "fp32".
    """
    device = channel_weights.device
    clean = clean_latents(samples, codec, statistics, device)
    noise, times = samples.noise.to(device), samples.task.times.to(device)
    noisy = noisy_latents(clean, noise, times)
    half = precision == "bf16"
    text = join_prompts(
        samples.texts, model.null_text, model.config.text_length, torch.bfloat16 if half else torch.float32
    )
    # Each weight is used once: a cache of their bfloat16 copies would only hold memory that FSDP means to free.
    with torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        velocity = model(noisy, times, text=text)
    supervised = samples.task.supervised.to(device)
    return flow_matching_loss(
        velocity, velocity_target(clean, noise), supervised, channel_weights, group_counts=group_counts
    )


@torch.no_grad()
def clean_latents(samples: Samples, codec: Codec, statistics: Statistics, device: torch.device) -> Tensor:
    """Normalised latents `[B,4,16,F,h,w]` of the samples' clips; zeros for streams that a clip does not have."""
    clips, available = samples.clips.clips.to(device), samples.clips.available.to(device)
    rgb, depth, _, cam_to_world = clips.everything()
    # Hidden parts must not reach the scale either: depth 0 is invalid, and cameras that stand still have no extent.
    has_depth = available[:, DEPTH, None, None, None]
    depth = torch.where(has_depth, depth, torch.zeros_like(depth))
    standing = torch.eye(4, device=device).expand_as(cam_to_world)
    cam_to_world = torch.where(available[:, -1, None, None, None], cam_to_world, standing)
    known = replace(clips, depth=depth, cam_to_world=cam_to_world)
    scale = observed_scale(known, samples.task.context, frame_groups(samples.frames)).to(device)
    filled = torch.where(has_depth, depth, torch.ones_like(depth))
    # Half of the codec's work is depth's: it is spared where no clip has any.
    any_depth = bool(samples.clips.available[:, DEPTH].any())
    known = replace(known, depth=filled if any_depth else None)
    streams = to_streams(known, scale, (rgb.shape[-2], rgb.shape[-1]))
    latents = encode_streams(streams, codec, statistics)
    return torch.where(available[:, :, None, None, None, None], latents, torch.zeros_like(latents))
