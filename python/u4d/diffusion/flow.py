"""Flow matching on four latent streams: the path from data to noise, its velocity, the shifted schedule.

A point of the path is z_t = (1 - t) z_0 + t eps with t in [0, 1]; the model predicts the velocity eps - z_0.
The noise level is per (clip, stream, latent frame). Source: the seed's training section, spec.md section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STREAMS = ("rgb", "depth", "ray_dir", "ray_moment")
LATENT_CHANNELS = 16
RAY_CHANNELS = 12  # four packed frames of three components; the other four are always empty
DEFAULT_SHIFT = 3.0

Generators = torch.Generator | Sequence[torch.Generator]


def channel_mask(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """[S,16], 1 where a channel carries something: the ray streams' channels 12..15 are empty.

    Empty channels take part in neither noise nor loss: their latents are zero at every noise level.
    """
    mask = torch.ones(len(STREAMS), LATENT_CHANNELS, device=device, dtype=dtype)
    mask[STREAMS.index("ray_dir") :, RAY_CHANNELS:] = 0
    return mask


CHANNEL_MASK = channel_mask()


def shift_time(t: Tensor, shift: float = DEFAULT_SHIFT) -> Tensor:
    """Shifted schedule t' = a t / (1 + (a - 1) t): for a > 1 more of [0, 1] is spent near noise.

    Args:
        t: any shape, in [0, 1]; 0 and 1 stay where they are.
        shift: a > 0; the seed's is 3.
    Raises:
        ValueError: shift is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift: expected a positive number, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def noisy_latents(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps.

    Args:
        clean, noise: [B,S,C,F,h,w].
        times: [B,S,F] in [0, 1].
    Returns:
        [B,S,C,F,h,w]; exactly `clean` where t = 0 and exactly `noise` where t = 1 (for finite input).
    Raises:
        ValueError: shapes disagree.
    """
    t = _over_latents(times, clean)
    if noise.shape != clean.shape:
        raise ValueError(f"noise: expected the shape of clean {list(clean.shape)}, got {list(noise.shape)}")
    return (1 - t) * clean + t * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """v = eps - z_0, what the model is asked for (the same at every noise level)."""
    return noise - clean


def clean_from_velocity(noisy: Tensor, velocity: Tensor, times: Tensor) -> Tensor:
    """The clean latents that a velocity implies: z_0 = z_t - t v.

    Args:
        noisy, velocity: [B,S,C,F,h,w].
        times: [B,S,F] in [0, 1].
    """
    return noisy - _over_latents(times, noisy) * velocity


def draw_noise(
    shape: Sequence[int],
    generator: Generators,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal latents with the empty ray channels at zero.

    Args:
        shape: (B,S,16,F,h,w).
        generator: one for the whole batch, or one per clip, so that a clip's noise does not depend on which
            other clips share its batch. The draw is made on the generator's own device, in float32.
        device, dtype: of the result; by default the generator's device.
    Raises:
        ValueError: the shape does not hold four streams of 16 channels, or there is not one generator per clip.
    """
    if len(shape) != 6 or shape[1] != len(STREAMS) or shape[2] != LATENT_CHANNELS:
        raise ValueError(f"shape: expected (B,{len(STREAMS)},{LATENT_CHANNELS},F,h,w), got {tuple(shape)}")
    if isinstance(generator, torch.Generator):
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
    else:
        require_one_per_clip(generator, shape[0])
        rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generator]
        noise = torch.stack(rows)
    noise = noise * channel_mask(noise.device)[None, :, :, None, None, None]
    return noise.to(device=device, dtype=dtype)


def draw_uniform(batch: int, count: int, generator: Generators) -> Tensor:
    """[B,count] float32 numbers, uniform in [0, 1); each clip's own where there is one generator per clip."""
    if isinstance(generator, torch.Generator):
        return torch.rand(batch, count, generator=generator, device=generator.device)
    require_one_per_clip(generator, batch)
    return torch.stack([torch.rand(count, generator=g, device=g.device) for g in generator])


def require_one_per_clip(generators: Sequence[torch.Generator], batch: int) -> None:
    """Raise ValueError unless there is exactly one generator for each of the `batch` clips."""
    if len(generators) != batch:
        raise ValueError(f"generator: expected one, or one per clip ({batch}), got {len(generators)}")


def _over_latents(times: Tensor, latents: Tensor) -> Tensor:
    """[B,S,F] -> [B,S,1,F,1,1], in the latents' dtype."""
    if latents.ndim != 6:
        raise ValueError(f"latents: expected [B,S,C,F,h,w], got {list(latents.shape)}")
    expected = [latents.shape[0], latents.shape[1], latents.shape[3]]
    if list(times.shape) != expected:
        raise ValueError(f"times: expected [B,S,F] = {expected} to match the latents, got {list(times.shape)}")
    return times[:, :, None, :, None, None].to(latents.dtype)
