"""The five conditioning patterns: what they give, how often they are drawn, how noise levels are distributed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from u4d.diffusion.patterns import (
    PATTERNS,
    allowed_patterns,
    draw_batch,
    draw_context,
    draw_times,
)

FULL, RGB_ONLY, RGB_CAMERA, RGB_DEPTH = (1, 1, 1, 1), (1, 0, 0, 0), (1, 0, 1, 1), (1, 1, 0, 0)
GEOMETRY_ONLY = (0, 1, 1, 1)


def streams(*rows: tuple[int, ...], repeat: int = 1) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool).repeat(repeat, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ks_distance(samples: Tensor, cdf: Tensor) -> float:
    """Kolmogorov-Smirnov distance; `cdf` is the law's distribution function at the sorted samples."""
    count = len(samples)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum((cdf - steps[:-1]).abs(), (cdf - steps[1:]).abs()).max())


@pytest.mark.parametrize(
    ("available", "frames", "names"),
    [
        (FULL, 6, PATTERNS),
        (RGB_ONLY, 6, ("joint", "first_frames", "geometry_sparse")),
        (RGB_CAMERA, 6, PATTERNS),
        (RGB_DEPTH, 6, ("joint", "first_frames", "geometry_dense", "geometry_sparse")),
        (GEOMETRY_ONLY, 6, ("joint", "first_frames")),
        (RGB_ONLY, 2, ("joint", "first_frames")),
        (RGB_CAMERA, 2, ("joint", "first_frames", "geometry_dense", "geometry_sparse")),
        (FULL, 1, ("joint", "geometry_dense", "camera_control", "geometry_sparse")),
        (RGB_ONLY, 1, ("joint",)),
        ((0, 0, 0, 0), 6, ()),
    ],
)
def test_patterns_allowed_by_what_a_dataset_annotates(
    available: tuple[int, ...], frames: int, names: tuple[str, ...]
) -> None:
    allowed = allowed_patterns(streams(available), frames)[0]
    assert tuple(name for name, yes in zip(PATTERNS, allowed.tolist(), strict=True) if yes) == names


def test_context_of_each_pattern() -> None:
    full = streams(FULL)[0]
    all_on, ends, none = [1] * 5, [1, 0, 0, 0, 1], [0] * 5
    expected = {
        "joint": [none] * 4,
        "geometry_dense": [all_on, none, none, none],
        "camera_control": [ends, none, all_on, all_on],
        "geometry_sparse": [ends, none, none, none],
    }
    for name, rows in expected.items():
        assert draw_context(name, full, 5, seeded()).int().tolist() == rows, name
    first = draw_context("first_frames", streams(RGB_CAMERA)[0], 5, seeded(), longest_history=1)
    assert first.int().tolist() == [[1, 0, 0, 0, 0], none, [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_history_is_uniform_over_its_lengths_and_always_a_prefix() -> None:
    batch = draw_batch(streams(FULL, repeat=8000), 7, generator=seeded(), weights={"first_frames": 1})
    lengths = batch.context.sum(-1)
    assert torch.equal(lengths, lengths[:, :1].expand(-1, 4))
    assert bool((batch.context == (torch.arange(7) < lengths[..., None])).all())
    shares = torch.bincount(lengths[:, 0], minlength=5) / 8000
    expected = torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0])  # 1..F // 2
    torch.testing.assert_close(shares, expected, atol=0.025, rtol=0)


def test_pattern_frequencies_follow_the_weights_among_those_allowed() -> None:
    weights = {"joint": 1.0, "geometry_dense": 4.0, "camera_control": 2.0, "geometry_sparse": 1.0}
    pattern = draw_batch(streams(FULL, RGB_ONLY, repeat=10000), 6, generator=seeded(), weights=weights).pattern.reshape(
        -1, 2
    )
    for column, expected in enumerate(([0.125, 0, 0.5, 0.25, 0.125], [0.5, 0, 0, 0, 0.5])):
        shares = torch.bincount(pattern[:, column], minlength=5) / len(pattern)
        torch.testing.assert_close(shares, torch.tensor(expected), atol=0.02, rtol=0)
        assert not shares[torch.tensor(expected) == 0].any()
    alike = torch.bincount(draw_batch(streams(FULL, repeat=10000), 6, generator=seeded(1)).pattern) / 10000
    torch.testing.assert_close(alike, torch.full((5,), 0.2), atol=0.02, rtol=0)


def test_context_levels() -> None:
    batch = draw_batch(streams(FULL, repeat=6000), 6, generator=seeded(), weights={"geometry_dense": 1})
    rgb = batch.times[:, 0]
    clean = (rgb == 0).all(-1)
    assert abs(float(clean.float().mean()) - 0.5) < 0.03
    assert bool((rgb[~clean] > 0).all())  # a sample's context is all clean, or all imperfect
    noisy = rgb[~clean].double()
    levels = noisy.flatten().sort().values
    assert ks_distance(levels, levels / 0.3) < 0.015
    assert abs(float(torch.corrcoef(noisy[:, :2].T)[0, 1])) < 0.06  # independent per group


def test_target_levels_above_a_uniform_floor() -> None:
    batch = draw_batch(streams(FULL, repeat=6000), 6, generator=seeded(), weights={"joint": 1})
    times = batch.times.double().reshape(6000, -1)
    floors = times.amin(-1).sort().values
    # P(t <= x) for one group: lo uniform, t = lo + (1 - lo) t', by quadrature over lo
    lo = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    levels = times[:, 7].sort().values
    within = ((levels[:, None] - lo) / (1 - lo)).clamp(0, 1)
    law = (within / (3 - 2 * within)).mean(-1)  # the inverse of 3 u / (1 + 2 u)
    assert ks_distance(levels, law) < 0.03
    assert float((floors > 0.9).double().mean()) > 0.09  # "everything still noise" is really met
    # Two groups share the sample's floor and nothing else: cov = Var(E[t | lo]) = (1 - E[t'])^2 / 12.
    shared = (1 - (1.5 - 0.75 * math.log(3))) ** 2 / 12
    assert abs(float(torch.cov(times[:, :2].T)[0, 1]) - shared) < 0.15 * shared


def test_a_fixed_floor_and_a_floor_of_zero() -> None:
    available = streams(FULL, repeat=4000)
    context = torch.zeros(4000, 4, 5, dtype=torch.bool)
    high = draw_times(context, available, generator=seeded(), target_floor=0.95)
    assert float(high.min()) >= 0.95 and float(high.max()) <= 1
    plain = draw_times(context, available, generator=seeded(), target_floor=0.0).double()[:, 1, 1].sort().values
    assert ks_distance(plain, plain / (3 - 2 * plain)) < 0.03
    assert bool((draw_times(context, available, generator=seeded(), target_floor=1.0) == 1).all())


def test_missing_streams_are_pure_noise_and_never_supervised() -> None:
    batch = draw_batch(streams(RGB_ONLY, RGB_CAMERA, GEOMETRY_ONLY, FULL, repeat=500), 6, generator=seeded())
    missing = ~streams(RGB_ONLY, RGB_CAMERA, GEOMETRY_ONLY, FULL, repeat=500)
    assert bool((batch.times[missing] == 1).all())
    assert not batch.supervised[missing].any() and not batch.context[missing].any()


@pytest.mark.parametrize("frames", [1, 2, 3, 14])
def test_what_carries_loss(frames: int) -> None:
    available = streams(FULL, RGB_ONLY, RGB_CAMERA, RGB_DEPTH, repeat=300)
    batch = draw_batch(available, frames, generator=seeded())
    groups = available[:, :, None].expand_as(batch.times)
    assert torch.equal(batch.supervised, groups & (batch.times > 0))
    assert bool((groups & ~batch.context).any(-1).any(-1).all())  # every sample has a target
    assert batch.context.shape == (1200, 4, frames) and batch.times.dtype == torch.float32
    targets_only = draw_batch(available, frames, generator=seeded(), supervise_context=False)
    assert torch.equal(targets_only.times, batch.times)
    assert torch.equal(targets_only.supervised, groups & ~batch.context)


def test_a_sample_draws_the_same_whatever_batch_it_is_in() -> None:
    available = streams(FULL, RGB_ONLY, RGB_CAMERA)
    together = draw_batch(available, 6, generator=[seeded(i) for i in range(3)])
    for index in range(3):
        alone = draw_batch(available[index : index + 1], 6, generator=[seeded(index)])
        assert torch.equal(alone.times[0], together.times[index])
        assert alone.pattern[0] == together.pattern[index]
    again = draw_batch(available, 6, generator=seeded(4))
    assert torch.equal(again.times, draw_batch(available, 6, generator=seeded(4)).times)
    assert not torch.equal(again.times, draw_batch(available, 6, generator=seeded(5)).times)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"geometry_dens": 1}}, "got 'geometry_dens'; did you mean 'geometry_dense'"),
        ({"weights": {"joint": -1}}, "weights: expected a finite number >= 0 for 'joint', got -1"),
        ({"weights": {"geometry_dense": 1}}, "sample 1 with streams rgb and 6 latent frames; give 'joint'"),
        ({"target_floor": 1.5}, 'target_floor: expected "uniform" or a number in [0, 1], got 1.5'),
        ({"target_floor": "unifrom"}, "got 'unifrom'"),
        ({"clean_context_prob": 2.0}, "clean_context_prob: expected a number in [0, 1], got 2.0"),
        ({"longest_history": 6}, "longest_history: expected 1..5, got 6"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        draw_batch(streams(FULL, RGB_ONLY), 6, generator=seeded(), **settings)
    assert message in str(error.value)


def test_a_pattern_that_a_sample_does_not_admit_is_refused() -> None:
    with pytest.raises(ValueError, match="'camera_control' leaves nothing to learn or needs a stream that is missing"):
        draw_context("camera_control", streams(RGB_ONLY)[0], 6, seeded())
