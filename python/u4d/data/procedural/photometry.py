"""A mild camera model: exposure drift, white balance, tone curve, vignette and sensor noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.data.procedural.colours import DISPLAY_GAMMA
from u4d.data.procedural.randomness import UniformStream

PHOTOMETRY_STREAM_LENGTH = 40
_NOISE_BITS = 19


@dataclass(frozen=True)
class Photometry:
    """gain [B,N,3] linear gain per frame and channel; target [B] mean luminance that the first frame is exposed to;
    gamma, vignette, noise, noise_start [B]."""

    gain: Tensor
    target: Tensor
    gamma: Tensor
    vignette: Tensor
    noise: Tensor
    noise_start: Tensor


def sample_photometry(stream: UniformStream, frames: int) -> Photometry:
    """Draw the camera of each clip, float64."""
    time = torch.arange(frames, dtype=torch.float64) / 17.0
    drift = torch.where(stream.chance(0.4), 0.25 * stream.normal(), 0.0)
    wave = torch.where(stream.chance(0.3), 0.06 * stream.normal(), 0.0)
    cycles, phase = stream.uniform(low=0.5, high=2.0), stream.uniform(high=2.0 * math.pi)
    stops = drift[:, None] * torch.sin(time)[None]
    stops = stops + wave[:, None] * torch.sin(2.0 * math.pi * cycles[:, None] * time + phase[:, None])
    balance = torch.exp(0.06 * stream.normal(3))
    return Photometry(
        gain=torch.exp2(stops)[..., None] * balance[:, None],
        target=0.25 * torch.exp2(0.45 * stream.normal()),
        gamma=DISPLAY_GAMMA * torch.exp(0.10 * stream.normal()),
        vignette=torch.where(stream.chance(0.4), stream.uniform(high=0.35), 0.0),
        noise=torch.where(stream.chance(0.7), stream.log_uniform(low=0.002, high=0.02), 0.0005),
        noise_start=stream.uniform(),
    )


def noise_table(device: torch.device | str = "cpu") -> Tensor:
    """A fixed strip of standard normal numbers that clips read from different places, [2^19]."""
    generator = torch.Generator().manual_seed(417)
    return torch.randn(1 << _NOISE_BITS, generator=generator, dtype=torch.float64).to(device, torch.float32)


def develop(linear: Tensor, camera: Photometry, table: Tensor) -> Tensor:
    """Linear light [B,N,3,H,W] to display values in [0,1], in place of the input's memory.

    Args:
        linear: scene light, >= 0.
        camera: `sample_photometry`, moved to the device and float32 where it is used.
        table: `noise_table()`.
    """
    batch, frames, _, height, width = linear.shape
    device = linear.device
    y = torch.linspace(-1.0, 1.0, height, device=device)[:, None]
    x = torch.linspace(-1.0, 1.0, width, device=device)[None]
    falloff = 1.0 - camera.vignette.to(device, torch.float32)[:, None, None] * (0.5 * (x * x + y * y))
    gain = camera.gain.to(device, torch.float32)
    inverse_gamma = (1.0 / camera.gamma).to(device, torch.float32)
    noise = camera.noise.to(device, torch.float32)
    base = torch.arange(3 * height * width, device=device)
    starts = (camera.noise_start * (1 << _NOISE_BITS)).long().tolist()
    for b in range(batch):
        metered = (float(camera.target[b]) / linear[b, 0].mean().clamp_min(1e-3)) ** 0.8  # auto-exposure, then held
        clip = linear[b].mul_((metered * gain[b])[:, :, None, None]).mul_(falloff[b])
        # a soft shoulder above 0.7: bright parts keep some texture
        clip.copy_(torch.where(clip > 0.7, 0.7 + 0.3 * (1.0 - torch.exp((0.7 - clip) / 0.3)), clip))
        clip.clamp_min_(1e-6).pow_(inverse_gamma[b])
        for n in range(frames):
            start = starts[b] + (n + 1) * 211_123
            strip = (base + start) & ((1 << _NOISE_BITS) - 1)
            clip[n].add_(torch.take(table, strip).view(3, height, width), alpha=float(noise[b]))
        clip.clamp_(0.0, 1.0)
    return linear
