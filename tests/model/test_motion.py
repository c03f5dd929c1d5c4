"""Motion features on patterns that move by a known number of pixels, through a codec that loses nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from u4d.model.motion import CELL, FEATURES, LEVELS, MotionFeatures, flow_features
from u4d_fast.time_layout import FRAMES_PER_GROUP, frame_groups

CHANNELS = FRAMES_PER_GROUP * CELL**2  # one channel per pixel of a group's cell: nothing is lost
HEIGHT, WIDTH = 96, 128


def exact_decoders() -> tuple[Tensor, Tensor]:
    """Affine maps from those channels to grey pixels, `[64,257]` and `[256,257]`: the latents hold 2 grey - 1."""
    decode = torch.cat((torch.eye(CHANNELS) / 2, torch.full((CHANNELS, 1), 0.5)), dim=1)
    return decode[: CELL**2], decode


def exact_latents(clip: Tensor) -> Tensor:
    """Grey clips `[B,N,H,W]` -> `[B,256,F,h,w]`; the single frames fill the first 64 channels."""
    groups = frame_groups(clip.shape[1])
    latents = pixel_unshuffle((2 * clip - 1)[:, groups].flatten(0, 1), CELL).unflatten(0, (len(clip), -1))
    latents[:, [0, -1], CELL**2 :] = 0
    return latents.transpose(1, 2)


def moving_pattern(frames: int, flow: tuple[float, float], wavelength: float = 12) -> Tensor:
    """Four plane waves that translate by `flow` (right, down) pixels per frame: `[1,N,H,W]`.

    A wavelength of 12 pixels of the level that looks at it is short enough for the flow to be determined in every
    cell, and long enough for central differences to be good to 5 %.
    """
    n, y, x = torch.meshgrid(
        torch.arange(frames, dtype=torch.float64),
        torch.arange(HEIGHT, dtype=torch.float64),
        torch.arange(WIDTH, dtype=torch.float64),
        indexing="ij",
    )
    x, y = x - flow[0] * n, y - flow[1] * n
    waves = [
        torch.sin(2 * math.pi / wavelength * (x * math.cos(angle) + y * math.sin(angle)) + 5 * angle)
        for angle in (0.3, 1.2, 2.0, 2.9)
    ]
    return torch.stack(waves).sum(0)[None].float() / 2


def flow_at(features: Tensor, level: int) -> Tensor:
    """(u, v) of one pyramid level, away from the border: `[F-1,2,h-4,w-4]`."""
    return features[0, 1:, 3 * level : 3 * level + 2, 2:-2, 2:-2]


@pytest.mark.parametrize("level", range(len(LEVELS)))
@pytest.mark.parametrize("frames", (2, 6, 10))
@pytest.mark.parametrize("direction", ((0.5, -0.3), (-0.4, 0.0), (0.0, 0.6)))
def test_translation_is_found(level: int, frames: int, direction: tuple[float, float]) -> None:
    """Every level of the pyramid finds, in pixels of the full image, what it is made for."""
    flow = (direction[0] * LEVELS[level], direction[1] * LEVELS[level])
    features = flow_features(exact_latents(moving_pattern(frames, flow, 12 * LEVELS[level])), *exact_decoders())
    assert features.shape == (1, len(frame_groups(frames)), FEATURES, HEIGHT // CELL, WIDTH // CELL)
    error = flow_at(features, level) - torch.tensor(flow)[:, None, None]
    assert error.abs().max() < 0.05 * LEVELS[level]


def test_each_latent_frame_has_its_own_flow() -> None:
    """The pattern stands still, then moves from the last frame of the first group on."""
    still = moving_pattern(1, (0, 0)).expand(-1, 5, -1, -1)
    moved = moving_pattern(6, (0.5, 0.25))[:, 1:]
    found = flow_at(flow_features(exact_latents(torch.cat((still, moved), dim=1)), *exact_decoders()), 0)
    assert found[0].abs().max() < 1e-6
    for later in found[1:]:
        assert (later - torch.tensor([0.5, 0.25])[:, None, None]).abs().max() < 0.05


def test_a_flat_clip_has_no_flow_and_less_confidence_than_texture() -> None:
    flat = flow_features(exact_latents(torch.full((1, 6, HEIGHT, WIDTH), 0.5)), *exact_decoders())
    textured = flow_features(exact_latents(moving_pattern(6, (0.5, 0.0))), *exact_decoders())
    for level in range(len(LEVELS)):
        assert flow_at(flat, level).abs().max() < 1e-5
        confidence = 3 * level + 2
        assert (textured[:, 1:, confidence] > flat[:, 1:, confidence] + 0.1).all()


def test_latent_frame_zero_and_single_frames_have_no_motion() -> None:
    features = flow_features(exact_latents(moving_pattern(6, (1.0, 0.0))), *exact_decoders())
    assert not features[:, 0].any()
    assert not flow_features(exact_latents(moving_pattern(1, (1.0, 0.0))), *exact_decoders()).any()


def motion_of_exact_codec(width: int = 12) -> MotionFeatures:
    torch.manual_seed(0)
    motion = MotionFeatures(width, CHANNELS)
    motion.grey_single, motion.grey_group = exact_decoders()
    torch.nn.init.normal_(motion.embed.bias)
    return motion


@torch.no_grad()
def test_tokens_are_zero_where_rgb_is_not_observed() -> None:
    """A latent frame has motion only where it and the one before it are observed, and then from these two alone."""
    motion = motion_of_exact_codec()
    latents = exact_latents(moving_pattern(14, (0.5, -0.5)))
    times = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.0]])
    tokens = motion(latents, times).unflatten(1, (5, -1))
    assert tokens.shape == (1, 5, HEIGHT // CELL // 2 * (WIDTH // CELL // 2), 12)
    assert tokens.any(dim=-1).all(dim=-1).tolist() == [[False, True, False, False, True]]
    assert tokens.any(dim=-1).any(dim=-1).tolist() == [[False, True, False, False, True]]
    noisy = latents.clone()
    noisy[:, :, 2] = torch.randn(latents[:, :, 2].shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(motion(noisy, times).unflatten(1, (5, -1)), tokens)


@torch.no_grad()
def test_half_precision_weights_do_not_coarsen_the_flow() -> None:
    latents = exact_latents(moving_pattern(6, (0.5, -0.5)))
    times = torch.zeros(1, 3)
    truth = motion_of_exact_codec()(latents, times)
    half = motion_of_exact_codec().bfloat16()(latents, times)
    assert half.dtype == torch.bfloat16
    assert ((half - truth).square().mean() / truth.square().mean()).sqrt() < 0.01
