"""Laws of the flow-matching path, the shifted schedule and the noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from u4d.diffusion.flow import (
    CHANNEL_MASK,
    channel_mask,
    clean_from_velocity,
    draw_noise,
    noisy_latents,
    shift_time,
    velocity_target,
)

SHAPE = (2, 4, 16, 3, 2, 5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_shift_keeps_the_ends_and_is_undone_by_the_inverse_shift(t: float, shift: float) -> None:
    time = torch.tensor([0.0, t, 1.0], dtype=torch.float64)
    shifted = shift_time(time, shift)
    assert shifted[0] == 0 and abs(float(shifted[2]) - 1) < 1e-15
    torch.testing.assert_close(shift_time(shifted, 1 / shift), time)
    assert float((shifted[1] - time[1]) * (shift - 1)) >= -1e-12  # above 1 towards noise, below 1 towards data


def test_shift_three_as_the_seed_writes_it() -> None:
    torch.testing.assert_close(shift_time(torch.tensor([0.5, 0.25])), torch.tensor([0.75, 0.5]))
    with pytest.raises(ValueError, match="shift: expected a positive number, got 0"):
        shift_time(torch.zeros(1), 0)


def test_the_path_starts_at_data_ends_at_noise_and_its_slope_is_the_velocity() -> None:
    clean, noise = torch.randn(2, *SHAPE, generator=seeded(), dtype=torch.float64)
    times = torch.rand(2, 4, 3, generator=seeded(1), dtype=torch.float64)
    times[0, 0, 0], times[1, 3, 2] = 0, 1
    path = noisy_latents(clean, noise, times)
    assert torch.equal(path[0, 0, :, 0], clean[0, 0, :, 0])
    assert torch.equal(path[1, 3, :, 2], noise[1, 3, :, 2])
    step = 1e-6
    slope = (noisy_latents(clean, noise, times + step) - noisy_latents(clean, noise, times - step)) / (2 * step)
    velocity = velocity_target(clean, noise)
    torch.testing.assert_close(slope, velocity, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(clean_from_velocity(path, velocity, times), clean)


def test_each_group_has_a_noise_level_of_its_own() -> None:
    clean, noise = torch.zeros(SHAPE), torch.ones(SHAPE)
    times = torch.arange(24.0).reshape(2, 4, 3) / 24
    path = noisy_latents(clean, noise, times)
    assert torch.equal(path, times[:, :, None, :, None, None].expand(SHAPE))


def test_empty_ray_channels_get_no_noise_and_all_others_do() -> None:
    noise = draw_noise((8, 4, 16, 3, 8, 8), seeded())
    alive = noise.abs().sum(dim=(0, 3, 4, 5)) > 0
    expected = [[True] * 16, [True] * 16, [True] * 12 + [False] * 4, [True] * 12 + [False] * 4]
    assert alive.tolist() == expected
    assert torch.equal(alive, CHANNEL_MASK.bool()) and torch.equal(CHANNEL_MASK, channel_mask("cpu"))
    live = noise.permute(1, 2, 0, 3, 4, 5)[alive]
    assert abs(float(live.mean())) < 0.01 and abs(float(live.std()) - 1) < 0.01


def test_noise_of_a_clip_with_its_own_generator_does_not_depend_on_the_batch() -> None:
    together = draw_noise(SHAPE, [seeded(5), seeded(9)])
    alone = draw_noise((1, *SHAPE[1:]), [seeded(9)])
    assert torch.equal(together[1], alone[0])
    assert torch.equal(draw_noise(SHAPE, seeded(3)), draw_noise(SHAPE, seeded(3)))


def test_wrong_shapes_are_named() -> None:
    clean = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"times: expected \[B,S,F\] = \[2, 4, 3\] to match the latents"):
        noisy_latents(clean, clean, torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"noise: expected the shape of clean"):
        noisy_latents(clean, clean[:1], torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"shape: expected \(B,4,16,F,h,w\), got \(2, 3, 16, 3, 2, 5\)"):
        draw_noise((2, 3, 16, 3, 2, 5), seeded())
    with pytest.raises(ValueError, match=r"one per clip \(2\), got 3"):
        draw_noise(SHAPE, [seeded(i) for i in range(3)])
