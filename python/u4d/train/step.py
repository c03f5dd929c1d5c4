"""One training step: draw a task, encode the clips, noise them, compare velocities."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from u4d.clips import Clips
from u4d.diffusion.flow import draw_noise, noisy_latents, velocity_target
from u4d.diffusion.losses import FlowLoss, flow_matching_loss
from u4d.diffusion.patterns import draw_batch
from u4d.geometry.cameras import relative_to_first
from u4d.model.latents import Codec, Statistics, encode_streams
from u4d.model.streams import observed_scale, to_streams
from u4d.model.transformer import Transformer
from u4d.train.recipe import Phase
from u4d_fast.time_layout import frame_groups


def training_loss(
    model: Transformer,
    codec: Codec,
    statistics: Statistics,
    clips: Clips,
    phase: Phase,
    weights: Tensor,
    generator: torch.Generator,
) -> FlowLoss:
    """Flow-matching loss of a batch of fully known clips under one random task per clip.

    Everything random comes from `generator`, which is the CPU's whatever the model's device is, so a step depends on
    its seed and its clips alone.
    """
    device = weights.device
    clips = random_cut(clips, phase, generator).to(device)
    rgb, *_ = clips.everything()
    groups = frame_groups(rgb.shape[1])
    available = draw_available(len(rgb), phase.rgb_only, generator)
    task = draw_batch(
        available,
        len(groups),
        generator=generator,
        weights=phase.patterns,
        target_floor=phase.target_floor,
        clean_context_prob=phase.clean_context_prob,
        supervise_context=phase.target_floor == "uniform",
    )
    with torch.no_grad():
        scale = observed_scale(clips, task.context, groups).to(device)
        clean = encode_streams(to_streams(clips, scale, (rgb.shape[-2], rgb.shape[-1])), codec, statistics)
    noise, times = draw_noise(clean.shape, generator, device=device), task.times.to(device)
    noisy = noisy_latents(clean, noise, times)
    with torch.autocast(device.type, torch.bfloat16):
        velocity = model(noisy, times)
    return flow_matching_loss(velocity, velocity_target(clean, noise), task.supervised.to(device), weights)


def draw_available(batch: int, rgb_only: float, generator: torch.Generator) -> Tensor:
    """Treat some fully known clips as RGB-only ones, `[B,4]` bool: "the first image alone" is met nowhere else."""
    available = torch.ones(batch, 4, dtype=torch.bool)
    available[torch.rand(batch, generator=generator) < rgb_only, 1:] = False
    return available


def random_cut(clips: Clips, phase: Phase, generator: torch.Generator) -> Clips:
    """A random stretch of the length that the phase asks for, its cameras relative to its first."""
    lengths = sorted(phase.frames)
    odds = torch.tensor([phase.frames[length] for length in lengths])
    *_, cam_to_world = clips.everything()
    total = cam_to_world.shape[1]
    frames = min(lengths[int(torch.multinomial(odds, 1, generator=generator))], total)
    start = int(torch.randint(total - frames + 1, (1,), generator=generator))
    cut = clips.map(lambda part: part[:, start : start + frames])
    return replace(cut, cam_to_world=relative_to_first(cam_to_world[:, start : start + frames]))
