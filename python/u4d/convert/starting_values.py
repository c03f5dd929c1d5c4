"""What a Wan checkpoint does not have: latent statistics of the ray streams, and fresh ends for a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u4d.diffusion.flow import LATENT_CHANNELS, RAY_CHANNELS, STREAMS
from u4d.model.stacked import StackedLinear
from u4d.model.transformer import PATCH, StackedPatchEmbedding, Transformer

# Mean and deviation of x, y, z over 256 clips of 50 frames (u4d.data.procedural.render_clips, split "train", 48x64),
# with poses relative to the first frame, the reference camera's rays subtracted from the directions, and moments
# divided by the clip's scale (its median depth). They are starting values: training measures its own data.
RAY_DIRECTIONS = ((-0.0012, -0.0003, -0.0145), (0.1311, 0.0764, 0.0690))
RAY_MOMENTS = ((-0.0040, 0.0042, 0.0000), (0.0565, 0.1078, 0.0298))
REFERENCE_FOV_RAD = 1.142  # mean horizontal field of view of the same clips

FRESH_SEED = 0
ENDS = ("patch_embedding.weight", "patch_embedding.bias", "proj_out.weight", "proj_out.bias")

Rows = tuple[tuple[float, ...], ...]


def latent_statistics(image_mean: list[float], image_std: list[float]) -> tuple[Rows, Rows]:
    """`[4][16]` means and deviations: the VAE's for RGB and depth, measured ones for the rays."""
    empty = LATENT_CHANNELS - RAY_CHANNELS
    frames = RAY_CHANNELS // 3  # packed into a latent frame
    rays = (RAY_DIRECTIONS, RAY_MOMENTS)
    means = tuple(mean * frames + (0.0,) * empty for mean, _ in rays)
    stds = tuple(std * frames + (1.0,) * empty for _, std in rays)
    return (tuple(image_mean),) * 2 + means, (tuple(image_std),) * 2 + stds


def fresh_ends(width: int) -> dict[str, Tensor]:
    """Patch embedding and head of all streams as a new Transformer would start with, the same every time."""
    ends: Any = torch.nn.Module()  # what `start_as_passthrough` looks at, without the rest of a model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FRESH_SEED)
        ends.patch_embedding = StackedPatchEmbedding(len(STREAMS), LATENT_CHANNELS, width)
        ends.proj_out = StackedLinear(len(STREAMS), width, LATENT_CHANNELS * PATCH**2)
    Transformer.start_as_passthrough(ends)
    return dict(ends.state_dict())
