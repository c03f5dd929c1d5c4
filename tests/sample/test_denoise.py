"""The sampling loop against data whose velocity is known in closed form: a correlated Gaussian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from u4d.diffusion.flow import CHANNEL_MASK, draw_noise
from u4d.diffusion.unipc import UniPCTable, unipc_table
from u4d.sample.denoise import denoise

FRAMES = 3
SHAPE = (4, 16, FRAMES, 1, 1)
SIZE = 4 * 16 * FRAMES
ALIVE = CHANNEL_MASK.bool()[:, :, None].expand(4, 16, FRAMES).reshape(-1)
OBSERVED = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
OBSERVED_CELLS = OBSERVED[:, None].expand(4, 16, FRAMES).reshape(-1)
GIVEN, WANTED = ALIVE & OBSERVED_CELLS, ALIVE & ~OBSERVED_CELLS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GaussianScenes:
    """Scenes drawn from one correlated Gaussian over all live cells, and the exact velocity of their noising."""

    def __init__(self) -> None:
        live = int(ALIVE.sum())
        factor = torch.randn(live, 6, generator=seeded(1), dtype=torch.float64)  # few causes, shared by all streams
        self.covariance = factor @ factor.T / 6 + 0.1 * torch.eye(live, dtype=torch.float64)
        self.mean = 0.5 * torch.randn(live, generator=seeded(2), dtype=torch.float64)
        self.calls = 0

    def velocity(self, latents: Tensor, times: Tensor) -> Tensor:
        """E[eps - z_0 | z_t] with a noise level per group; clips of equal noise levels are solved together."""
        self.calls += 1
        answer = torch.full((len(latents), SIZE), 7.0, dtype=torch.float64)  # empty channels answer nonsense
        levels = times.double()[:, :, None].expand(-1, 4, 16, FRAMES).reshape(len(latents), SIZE)[:, ALIVE]
        flat = latents.reshape(len(latents), SIZE)[:, ALIVE]
        rows, which = levels.unique(dim=0, return_inverse=True)
        for index, t in enumerate(rows):
            signal = (1 - t)[:, None] * self.covariance  # A Sigma, A = diag(1 - t)
            noisy_covariance = signal * (1 - t) + torch.diag(t.square())
            deviation = flat[which == index] - (1 - t) * self.mean
            solved = torch.linalg.solve(noisy_covariance, deviation.T).T
            clean, noise = self.mean + solved @ signal, t * solved
            answer[(which == index)[:, None] & ALIVE] = (noise - clean).flatten()
        return answer.reshape(len(latents), *SHAPE)

    def conditional(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the wanted cells, by the textbook formula."""
        g, w = GIVEN[ALIVE], WANTED[ALIVE]
        gain = torch.linalg.solve(self.covariance[g][:, g], self.covariance[g][:, w]).T
        mean = self.mean[w] + gain @ (given - self.mean[g])
        return mean, self.covariance[w][:, w] - gain @ self.covariance[g][:, w]


def history(batch: int) -> Tensor:
    one = torch.randn(1, *SHAPE, generator=seeded(3), dtype=torch.float64)
    one = one * CHANNEL_MASK[None, :, :, None, None, None]
    return one.expand(batch, -1, -1, -1, -1, -1).clone()


def affine_map(scenes: GaussianScenes, steps: int, guidance: float) -> tuple[Tensor, Tensor]:
    """The sampler's exact law noise -> wanted cells, x = M noise + c, from one unit noise per cell (and none)."""
    noise = torch.cat([torch.zeros(1, SIZE, dtype=torch.float64), torch.eye(SIZE, dtype=torch.float64)[ALIVE]])
    noise = noise.reshape(-1, *SHAPE)
    result = denoise(
        scenes.velocity, history(len(noise)), OBSERVED, unipc_table(steps), noise=noise, guidance=guidance
    ).reshape(len(noise), SIZE)[:, WANTED]
    return (result[1:] - result[0]).T, result[0]


def test_samples_have_the_conditional_mean_and_covariance() -> None:
    scenes = GaussianScenes()
    mean, covariance = scenes.conditional(history(1).reshape(-1)[GIVEN])
    errors = []
    for steps in (10, 40, 160):
        matrix, offset = affine_map(scenes, steps, guidance=1.0)
        assert not matrix[:, GIVEN[ALIVE]].any()  # noise of the observed groups plays no part
        assert float((offset - mean).norm() / mean.norm()) < 1e-5  # its path is straight: exact at any step
        errors.append(float((matrix @ matrix.T - covariance).norm() / covariance.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.03 and errors[2] < 0.003, errors


def test_without_guidance_weight_the_history_is_ignored() -> None:
    """w = 0 leaves v_0, which sees noise in place of the history: the samples follow the unconditional law."""
    scenes = GaussianScenes()
    matrix, offset = affine_map(scenes, 80, guidance=0.0)
    wanted = WANTED[ALIVE]
    covariance = scenes.covariance[wanted][:, wanted]
    assert float((offset - scenes.mean[wanted]).norm() / scenes.mean.norm()) < 0.005
    assert float((matrix @ matrix.T - covariance).norm() / covariance.norm()) < 0.005


def test_guidance_solves_the_flow_of_the_combined_velocity() -> None:
    """The whole loop against Runge-Kutta on dx/dt = v_0 + 2 (v_H - v_0), written out by hand."""
    scenes = GaussianScenes()
    noise = draw_noise((2, *SHAPE), seeded(4), dtype=torch.float64)
    given = history(2)
    cells = OBSERVED[None, :, None, :, None, None]

    def combined(sample: Tensor, time: float) -> Tensor:
        seen = OBSERVED.expand(2, 4, FRAMES)
        level = torch.full(seen.shape, time, dtype=torch.float64)
        with_history = scenes.velocity(torch.where(cells, given, sample), level.masked_fill(seen, 0))
        without = scenes.velocity(torch.where(cells, noise, sample), level.masked_fill(seen, 1))
        return (without + 2 * (with_history - without)) * CHANNEL_MASK[None, :, :, None, None, None]

    sample, count = noise, 100
    h = -1 / count
    for index in range(count):
        t = 1 + index * h
        k1 = combined(sample, t)
        k2 = combined(sample + h / 2 * k1, t + h / 2)
        k3 = combined(sample + h / 2 * k2, t + h / 2)
        k4 = combined(sample + h * k3, max(t + h, 0.0))
        sample = sample + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    result = denoise(scenes.velocity, given, OBSERVED, unipc_table(160), noise=noise)
    difference = torch.where(cells, 0, result - sample)
    assert float(difference.norm() / sample.norm()) < 0.005


def table_of(steps: int = 4) -> UniPCTable:
    return unipc_table(steps)


def test_what_the_model_is_shown_at_every_step() -> None:
    """Both branches in one batch: the first half sees clean history at t = 0, the second noise at t = 1."""
    noise, given, shown = draw_noise((2, *SHAPE), seeded(5)), history(2).float(), []

    def velocity(latents: Tensor, times: Tensor) -> Tensor:
        shown.append((latents.clone(), times.clone()))
        return torch.randn(latents.shape, generator=seeded(len(shown)))

    table = table_of()
    done: list[tuple[int, int]] = []
    denoise(velocity, given, OBSERVED, table, noise=noise, progress=lambda step, total: done.append((step, total)))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)] and len(shown) == 4
    for step, (latents, times) in enumerate(shown):
        assert latents.shape[0] == 4 and times.dtype == torch.float32
        with_history, without = latents.movedim(3, 2).chunk(2)  # [2,4,F,16,1,1]
        seen = OBSERVED.expand(2, 4, FRAMES)
        assert torch.equal(with_history[seen], given.movedim(3, 2)[seen])
        assert torch.equal(without[seen], noise.movedim(3, 2)[seen])
        assert torch.equal(with_history[~seen], without[~seen])
        level = torch.full(seen.shape, float(table.times[step]))
        assert torch.equal(times, torch.cat([level.masked_fill(seen, 0), level.masked_fill(seen, 1)]))


def test_observed_groups_come_back_bit_for_bit_and_empty_channels_stay_empty() -> None:
    given = history(2).float()
    given[:, 1] = torch.nan  # depth is not observed: its latents are never looked at
    given[:, 2:, :12, 1:] = torch.nan
    noise = torch.randn(2, *SHAPE, generator=seeded(6))  # empty channels not even empty
    result = denoise(lambda latents, times: latents.sin() + 3, given, OBSERVED, table_of(), noise=noise)
    assert bool(result.isfinite().all())
    seen = OBSERVED.expand(2, 4, FRAMES)
    assert torch.equal(result.movedim(3, 2)[seen], given.movedim(3, 2)[seen])
    assert not result[:, 2:, 12:].any()


@pytest.mark.parametrize(
    ("observed", "guidance", "batches"),
    [(OBSERVED, 2.0, 4), (OBSERVED, 1.0, 2), (torch.zeros_like(OBSERVED), 2.0, 2)],
)
def test_one_branch_is_enough_without_guidance_or_history(observed: Tensor, guidance: float, batches: int) -> None:
    sizes: list[int] = []

    def velocity(latents: Tensor, times: Tensor) -> Tensor:
        sizes.append(len(latents))
        return latents

    noise = draw_noise((2, *SHAPE), seeded(7))
    denoise(velocity, history(2).float(), observed, table_of(3), noise=noise, guidance=guidance)
    assert sizes == [batches] * 3


def test_nothing_to_complete_means_no_model_call() -> None:
    def velocity(latents: Tensor, times: Tensor) -> Tensor:
        raise AssertionError("the model was asked")

    given, noise = history(1).float(), draw_noise((1, *SHAPE), seeded(8))
    everything = torch.ones(4, FRAMES, dtype=torch.bool)
    assert torch.equal(denoise(velocity, given, everything, table_of(), noise=noise), given)


def test_clips_of_a_batch_may_observe_different_things() -> None:
    scenes = GaussianScenes()
    noise, given = draw_noise((2, *SHAPE), seeded(9), dtype=torch.float64), history(2)
    observed = torch.stack([OBSERVED, ~OBSERVED])
    together = denoise(scenes.velocity, given, observed, table_of(), noise=noise)
    for index in range(2):
        one = slice(index, index + 1)
        alone = denoise(scenes.velocity, given[one], observed[index], table_of(), noise=noise[one])
        torch.testing.assert_close(together[one], alone)


def test_wrong_arguments_are_named() -> None:
    noise = draw_noise((2, *SHAPE), seeded())
    with pytest.raises(ValueError, match=r"observed_latents: expected \[B,4,16,F,h,w\] like noise"):
        denoise(lambda latents, times: latents, noise[:1], OBSERVED, table_of(), noise=noise)
    with pytest.raises(ValueError, match=r"observed: expected \[4, 3\] or \[2, 4, 3\] bool, got \[4, 2\]"):
        denoise(lambda latents, times: latents, noise, OBSERVED[:, :2], table_of(), noise=noise)
    with pytest.raises(ValueError, match="guidance: expected a finite number, got nan"):
        denoise(lambda latents, times: latents, noise, OBSERVED, table_of(), noise=noise, guidance=float("nan"))
