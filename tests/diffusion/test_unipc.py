"""The UniPC table against diffusers' scheduler, and by laws of its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from u4d.diffusion.unipc import unipc_start, unipc_step, unipc_table


def toy_velocity(sample: Tensor, time: float) -> Tensor:
    """Nonlinear in the sample and the time."""
    return torch.sin(2.0 * sample + 3.0 * time) + 0.5 * sample * math.cos(5.0 * time) - 0.3


def our_trajectory(noise: Tensor, steps: int, shift: float = 3.0, order: int = 2) -> list[Tensor]:
    table = unipc_table(steps, shift, order)
    state = unipc_start(noise, table)
    samples = []
    for index in range(steps):
        state = unipc_step(state, toy_velocity(state.sample, float(table.times[index])), table, index)
        samples.append(state.sample)
    return samples


def diffusers_trajectory(noise: Tensor, steps: int, shift: float, order: int) -> tuple[list[Tensor], Tensor]:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", solver_order=order
    )
    scheduler.set_timesteps(steps)
    sample, samples = noise, []
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = toy_velocity(sample, float(scheduler.sigmas[index]))
        sample = scheduler.step(velocity, timestep, sample).prev_sample
        samples.append(sample)
    return samples, scheduler.sigmas


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 10, 20, 25, 33, 40, 50])
def test_whole_trajectory_equals_diffusers(steps: int) -> None:
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs, sigmas = diffusers_trajectory(noise, steps, shift=3.0, order=2)
    ours = our_trajectory(noise, steps)
    assert np.array_equal(unipc_table(steps).times, sigmas.double().numpy())
    for index, (our_sample, their_sample) in enumerate(zip(ours, theirs, strict=True)):
        assert float((our_sample - their_sample).abs().max()) < 1e-5, f"step {index} of {steps}"


@pytest.mark.parametrize(("shift", "order"), [(1.0, 2), (5.0, 2), (3.0, 1), (3.0, 3)])
def test_other_settings_equal_diffusers(shift: float, order: int) -> None:
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for steps in (2, 7, 30):
        theirs, _ = diffusers_trajectory(noise, steps, shift, order)
        torch.testing.assert_close(our_trajectory(noise, steps, shift, order)[-1], theirs[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_constant_clean_prediction_is_reached_exactly_along_the_straight_path(order: int) -> None:
    """If the model always points to one clean sample, every x_i lies on the line between it and the noise."""
    generator = torch.Generator().manual_seed(2)
    noise, clean = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    for steps in (1, 2, 3, 17):
        table = unipc_table(steps, order=order)
        start = (1 - table.times[0]) * clean + table.times[0] * noise
        state = unipc_start(start, table)
        for index in range(steps):
            state = unipc_step(state, (state.sample - clean) / table.times[index], table, index)
            time = table.times[index + 1]
            torch.testing.assert_close(state.sample, (1 - time) * clean + time * noise, atol=1e-12, rtol=1e-12)


def runge_kutta(sample: Tensor, steps: int = 2000) -> Tensor:
    """The same flow from t = 1 to 0 by the classical method of order 4: no schedule, no table."""
    h = -1 / steps
    for index in range(steps):
        t = 1 + index * h
        k1 = toy_velocity(sample, t)
        k2 = toy_velocity(sample + h / 2 * k1, t + h / 2)
        k3 = toy_velocity(sample + h / 2 * k2, t + h / 2)
        k4 = toy_velocity(sample + h * k3, t + h)
        sample = sample + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return sample


def test_it_solves_the_flow_and_at_second_order() -> None:
    noise = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = runge_kutta(noise)

    def error(steps: int, order: int) -> float:
        return float((our_trajectory(noise, steps, 3.0, order)[-1] - exact).norm())

    assert error(160, 2) < error(40, 2) / 12  # fourfold per halving of the step would be 16
    assert error(40, 2) < 0.6 * error(40, 1)
    assert error(320, 2) < 1e-3


def test_history_that_does_not_exist_has_no_weight() -> None:
    table = unipc_table(6, order=3)
    for index in range(table.steps):
        assert not table.corrector_clean[index, index + 1 :].any()
        assert not table.predictor_clean[index, index + 1 :].any()
    assert table.corrector_current.tolist() == [1, 0, 0, 0, 0, 0]
    assert table.predictor_sample[-1] == 0 and table.predictor_clean[-1].tolist() == [1, 0, 0]
    assert np.all(np.diff(table.times) < 0) and table.times[-1] == 0


@pytest.mark.parametrize("bad", [{"steps": 0}, {"shift": 0.0}, {"shift": math.inf}, {"order": 0}, {"order": 4}])
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        unipc_table(**bad)
