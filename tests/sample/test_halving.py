"""Early halving: the schedule, the survivors, and that a candidate which goes on is the one of the full search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from u4d.diffusion.flow import draw_noise
from u4d.diffusion.unipc import unipc_start, unipc_table
from u4d.errors import UserError
from u4d.sample.candidates import Sampling, draw_candidates, total_steps
from u4d.sample.captured import Denoiser
from u4d.sample.denoise import clean_estimate, denoise
from u4d.sample.halving import Cut, KnownImages, keep_best, plan_cuts, usual_counts, without_known_images
from u4d.sample.search import CandidateScores, draw_candidate_noise
from u4d.sample.step import Velocity, conditions

SHAPE = (4, 16, 3, 2, 2)
OBSERVED = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
STEPS = 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_velocity(latents: Tensor, times: Tensor) -> Tensor:
    return 0.7 * latents + 0.3 * latents.roll(1, dims=3).sin() * times[:, :, None, :, None, None] + 0.1


def test_the_usual_counts_and_when_they_apply() -> None:
    assert [usual_counts(n) for n in (1, 2, 4, 5, 16, 64)] == [
        *([1], [2, 1], [4, 1], [5, 2, 1], [16, 4, 1], [64, 16, 4, 1])
    ]
    assert plan_cuts(16, 40, False) == plan_cuts(1, 1, False) == ()
    assert plan_cuts(16, 40, True) == (Cut(5, 4), Cut(15, 1))
    assert plan_cuts(16, 40, (16, 4)) == (Cut(5, 4),)
    assert plan_cuts(8, 40, (8, 6, 2)) == (Cut(5, 6), Cut(15, 2))


@pytest.mark.parametrize("candidates", [2, 5, 16, 64])
@pytest.mark.parametrize("steps", range(4, 50))
def test_cuts_come_one_after_the_other_and_before_the_last_step(candidates: int, steps: int) -> None:
    cuts = plan_cuts(candidates, steps, True)
    after = [0, *(cut.after for cut in cuts), steps]
    assert after == sorted(set(after)) and cuts[-1].keep == 1


@pytest.mark.parametrize("halving", [(8, 4), (16, 16), (16, 4, 8), (16, 0)])
def test_counts_must_fall_from_the_number_drawn(halving: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"begin with candidates = 16 and fall, at least 1, got (16|8)"):
        plan_cuts(16, 40, halving)


def test_there_must_be_steps_between_which_to_compare() -> None:
    with pytest.raises(UserError, match=r"expected more than 2 steps.*got 2"):
        plan_cuts(16, 2, True)
    assert plan_cuts(16, 3, True) == (Cut(1, 4), Cut(2, 1))
    with pytest.raises(UserError, match=r"at least 2 candidates.*got 1"):
        plan_cuts(1, 40, True)


def scores_of(errors: Tensor) -> CandidateScores:
    pairs = torch.tensor([[0, 1], [1, 0]])
    return CandidateScores(errors, errors[:, None].expand(-1, 2), torch.ones(len(errors), 2), pairs)


def test_the_best_stay_in_their_order() -> None:
    found, places = keep_best(scores_of(torch.tensor([0.4, 0.1, torch.nan, 0.3, 0.2])), [3, 5, 6, 8, 9], Cut(7, 3))
    assert places == [1, 3, 4] and found.kept == [5, 8, 9] and found.candidates == [3, 5, 6, 8, 9]
    assert found.after == 7 and found.errors[1] == pytest.approx(0.1) and found.overlap == [1.0] * 5
    assert found.facts().keys() == {"after", "candidates", "errors", "overlap", "kept"}


def test_the_estimate_is_the_clean_latents_that_the_last_answer_implies() -> None:
    """z_0 = z_t - t v at the last step's point; at the last step of all it is the result."""
    noise, held = draw_noise((2, *SHAPE), seeded(1)), torch.randn(2, *SHAPE, generator=seeded(2))
    asked: list[tuple[Tensor, Tensor]] = []

    def velocity(latents: Tensor, times: Tensor) -> Tensor:
        asked.append((latents, times))
        return toy_velocity(latents, times)

    observed, table = OBSERVED.expand(2, 4, 3), unipc_table(STEPS)
    given = conditions(velocity, held, observed, table, like=noise, guidance=1.0)
    denoiser = Denoiser(given, noise)
    denoiser.run(noise, unipc_start(noise, table), 0, 3)
    latents, times = asked[-1]
    implied = latents - times[:, :, None, :, None, None] * toy_velocity(latents, times) * given.alive
    torch.testing.assert_close(clean_estimate(given, denoiser.state), torch.where(given.cells, held, implied))
    denoiser.run(noise, unipc_start(noise, table), 0, STEPS)
    whole = denoise(toy_velocity, held, OBSERVED, table, noise=noise, guidance=1.0)
    torch.testing.assert_close(clean_estimate(given, denoiser.state), whole)


class Judge:
    """Scores by a rule that the test knows: candidates are told by their noise."""

    def __init__(self, order: list[int]) -> None:
        self.order, self.compared = order, 0

    def __call__(self, latents: Tensor) -> CandidateScores:
        """The first that are compared are all of them; later ones are those that stayed."""
        alive = sorted(self.order[: len(latents)]) if self.compared else list(range(len(latents)))
        self.compared += 1
        return scores_of(torch.tensor([float(self.order.index(k)) for k in alive]))


@contextmanager
def model() -> Iterator[Velocity]:
    yield toy_velocity


@pytest.mark.parametrize("at_once", [1, 3, 4, 16])
def test_who_goes_on_is_what_the_full_search_would_have_made_of_it(at_once: int) -> None:
    clean = torch.randn(1, *SHAPE, generator=seeded(2))
    sampling = Sampling(clean, OBSERVED, unipc_table(STEPS), 2.0, seed=7, at_once=at_once)
    order = [6, 1, 4, 0, 8, 2, 3, 5, 7]
    told: list[tuple[int, int]] = []
    cuts = (Cut(2, 4), Cut(5, 2))
    drawn = draw_candidates(
        sampling, model, 9, cuts=cuts, score=Judge(order), progress=lambda done, total: told.append((done, total))
    )
    assert drawn.numbers == [1, 6] and [part.kept for part in drawn.rounds] == [[0, 1, 4, 6], [1, 6]]
    assert [part.candidates for part in drawn.rounds] == [list(range(9)), [0, 1, 4, 6]]
    total = total_steps(9, sampling, cuts)
    assert told == [(done + 1, total) for done in range(total)]
    full = draw_candidates(sampling, model, 9)
    assert full.numbers == list(range(9)) and not full.rounds
    torch.testing.assert_close(drawn.latents, full.latents[[1, 6]])
    alone = denoise(
        toy_velocity, clean, OBSERVED, sampling.table, noise=draw_candidate_noise(7, 1, SHAPE, first=6), guidance=2.0
    )
    torch.testing.assert_close(drawn.latents[1:], alone)


def test_the_model_is_put_away_while_candidates_are_compared() -> None:
    """Under offload it moves: nothing that was recorded with it may be used again."""
    events: list[str] = []

    @contextmanager
    def offloaded() -> Iterator[Velocity]:
        events.append("in")
        yield lambda latents, times: toy_velocity(latents, times)
        events.append("out")

    def score(latents: Tensor) -> CandidateScores:
        events.append(f"score {len(latents)}")
        return scores_of(torch.arange(len(latents)).float())

    sampling = Sampling(torch.zeros(1, *SHAPE), OBSERVED, unipc_table(STEPS), 1.0, seed=0)
    drawn = draw_candidates(sampling, offloaded, 5, cuts=plan_cuts(5, STEPS, True), score=score)
    assert events == ["in", "out", "score 5", "in", "out", "score 2", "in", "out"]
    assert drawn.numbers == [0] and drawn.launching == "eager: it runs on the CPU"


def test_nothing_to_denoise_means_no_model_call() -> None:
    clean = torch.randn(1, *SHAPE, generator=seeded(2))
    sampling = Sampling(clean, torch.ones(4, 3, dtype=torch.bool), unipc_table(STEPS), 2.0, seed=0)

    def never() -> None:
        raise AssertionError("asked")

    for cuts, left in (((), 4), ((Cut(1, 2),), 2)):
        drawn = draw_candidates(sampling, never, 4, cuts=cuts)
        assert drawn.numbers == list(range(left)) and torch.equal(drawn.latents, clean.expand(left, *SHAPE))


class Codec:
    """Counts what it decodes."""

    def __init__(self) -> None:
        self.decoded: list[str] = []

    def encode(self, clip: Tensor, stream: str) -> Tensor:
        return clip

    def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor:
        self.decoded.append(stream)
        return torch.zeros(len(latents), num_frames, 3 if stream == "rgb" else 1, 16, 16)


def test_images_that_are_all_known_are_not_decoded() -> None:
    codec, rgb = Codec(), torch.rand(1, 5, 3, 16, 16)
    latents = torch.zeros(2, 16, 3, 2, 2)
    spared = without_known_images(codec, rgb, torch.ones(5, dtype=torch.bool))
    assert isinstance(spared, KnownImages)
    torch.testing.assert_close((spared.decode(latents, "rgb", 5) + 1) / 2, rgb.expand(2, -1, -1, -1, -1))
    assert spared.decode(latents, "depth", 5).shape == (2, 5, 1, 16, 16) and codec.decoded == ["depth"]
    assert without_known_images(codec, rgb, torch.tensor([1, 1, 1, 1, 0], dtype=torch.bool)) is codec
    assert without_known_images(codec, None, torch.zeros(5, dtype=torch.bool)) is codec
