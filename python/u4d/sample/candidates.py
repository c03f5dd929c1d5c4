"""Drawing the candidates of a completion: batch by batch, with or without giving some up on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.diffusion.unipc import UniPCState, UniPCTable, unipc_start
from u4d.sample.captured import Denoiser, copied
from u4d.sample.denoise import checked_groups, clean_estimate, result_of
from u4d.sample.halving import Cut, Round, keep_best
from u4d.sample.search import CandidateScores, draw_candidate_noise
from u4d.sample.step import Conditions, Velocity, conditions

AT_ONCE = 4

Model = Callable[[], AbstractContextManager[Velocity]]
"""Brings the model to where it works, for the time that its answers are wanted."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """What all candidates of a completion share.

    Attributes:
        clean: [1,4,16,F,h,w], clean latents of what is observed.
        observed: [4,F] bool.
        table: from `unipc_table`.
        guidance: w.
        seed: of the search; candidate k's noise depends on it and k alone.
        capture, prevented: see `Denoiser`.
        at_once: candidates of a batch.
    """

    clean: Tensor
    observed: Tensor
    table: UniPCTable
    guidance: float
    seed: int
    capture: bool | None = None
    prevented: str = ""
    at_once: int = AT_ONCE


@dataclass(frozen=True, eq=False)
class Batch:
    """Some candidates on their way.

    Attributes:
        numbers: which.
        noise: [K,4,16,F,h,w].
        state: the sampler's.
    """

    numbers: list[int]
    noise: Tensor
    state: UniPCState

    def take(self, places: list[int]) -> Batch:
        """Some of them."""
        rows = torch.tensor(places, device=self.noise.device)
        sample, last, clean = self.state.sample[rows], self.state.last[rows], tuple(x[rows] for x in self.state.clean)
        return Batch([self.numbers[k] for k in places], self.noise[rows], UniPCState(sample, last, clean))


@dataclass(frozen=True, eq=False)
class Drawn:
    """Candidates that were finished.

    Attributes:
        latents: [K,4,16,F,h,w].
        numbers: which these are.
        rounds: what was given up on the way.
        launching: how steps were launched, in words; see `Launching`.
    """

    latents: Tensor
    numbers: list[int]
    rounds: tuple[Round, ...]
    launching: str


@torch.no_grad()
def draw_candidates(
    sampling: Sampling,
    model: Model,
    count: int,
    *,
    cuts: tuple[Cut, ...] = (),
    score: Callable[[Tensor], CandidateScores] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Draw candidates 0 .. count - 1.

    Args:
        sampling: what they share.
        model: a context in which it answers; left while candidates are scored.
        count: L.
        cuts: from `plan_cuts`.
        score: scores clean latents `[K,4,16,F,h,w]`; wanted where there are cuts.
        progress: called as progress(steps done, steps in all), over all batches.
    Raises:
        ValueError: shapes disagree, or guidance is not finite.
    """
    runs = Runs(sampling, progress, total_steps(count, sampling, cuts))
    if bool(sampling.observed.all()):
        kept = cuts[-1].keep if cuts else count
        latents = sampling.clean.float().expand(kept, *sampling.clean.shape[1:])
        return Drawn(latents, list(range(kept)), (), "nothing to denoise")
    batches: Iterable[Batch] = fresh_batches(sampling, count)
    rounds: list[Round] = []
    begin = 0
    for cut in cuts:
        with model() as velocity:
            stopped = [runs.advance(velocity, batch, begin, cut.after) for batch in batches]
        assert score is not None
        together = joined([batch for batch, _ in stopped])
        found, places = keep_best(score(torch.cat([estimate for _, estimate in stopped])), together.numbers, cut)
        rounds.append(found)
        batches = list(split(together.take(places), sampling.at_once))
        begin = cut.after
    with model() as velocity:
        finished = [runs.finish(velocity, batch, begin) for batch in batches]
        latents = torch.cat([latents for _, latents in finished])
    numbers = [number for some, _ in finished for number in some]
    return Drawn(latents, numbers, tuple(rounds), "; ".join(dict.fromkeys(runs.launched)))


class Runs:
    """Runs batches through steps; those of one size share buffers and graph until the model is put away."""

    def __init__(self, sampling: Sampling, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.sampling, self.progress, self.total = sampling, progress, total
        self.done = 0
        self.launched: list[str] = []
        self.velocity: Velocity | None = None
        self.ready: dict[int, tuple[Conditions, Denoiser]] = {}

    def advance(self, velocity: Velocity, batch: Batch, begin: int, stop: int) -> tuple[Batch, Tensor]:
        """A batch after step stop - 1, and its clean estimate."""
        given, denoiser = self.run(velocity, batch, begin, stop)
        state = copied(denoiser.state)
        return Batch(batch.numbers, batch.noise, state), clean_estimate(given, state)

    def finish(self, velocity: Velocity, batch: Batch, begin: int) -> tuple[list[int], Tensor]:
        """A batch's numbers and its results."""
        given, denoiser = self.run(velocity, batch, begin, self.sampling.table.steps)
        return batch.numbers, result_of(given, denoiser.state)

    def run(self, velocity: Velocity, batch: Batch, begin: int, stop: int) -> tuple[Conditions, Denoiser]:
        given, denoiser = self.denoiser(velocity, batch.noise)
        denoiser.run(batch.noise, batch.state, begin, stop, None if self.progress is None else self.tell)
        self.launched.append(str(denoiser.launching))
        return given, denoiser

    def denoiser(self, velocity: Velocity, noise: Tensor) -> tuple[Conditions, Denoiser]:
        """Buffers for batches like that; a graph holds addresses of weights, so a model that moved needs new ones."""
        if velocity is not self.velocity:
            self.velocity, self.ready = velocity, {}
        if len(noise) not in self.ready:
            sampling = self.sampling
            clean = sampling.clean.expand(noise.shape)
            observed = checked_groups(clean, sampling.observed, noise, sampling.guidance)
            given = conditions(velocity, clean, observed, sampling.table, like=noise, guidance=sampling.guidance)
            denoiser = Denoiser(given, noise, capture=sampling.capture, prevented=sampling.prevented)
            self.ready[len(noise)] = given, denoiser
        return self.ready[len(noise)]

    def tell(self, step: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def fresh_batches(sampling: Sampling, count: int) -> Iterator[Batch]:
    """All candidates before the first step; noise is drawn when a batch's turn comes."""
    clean = sampling.clean
    for first in range(0, count, sampling.at_once):
        size = min(sampling.at_once, count - first)
        noise = draw_candidate_noise(sampling.seed, size, clean.shape[1:], first=first, device=clean.device)
        yield Batch(list(range(first, first + size)), noise, unipc_start(noise, sampling.table))


def joined(batches: list[Batch]) -> Batch:
    """All candidates of several batches."""
    states = [batch.state for batch in batches]
    history = zip(*(state.clean for state in states), strict=True)
    state = UniPCState(
        torch.cat([state.sample for state in states]),
        torch.cat([state.last for state in states]),
        tuple(torch.cat(list(parts)) for parts in history),
    )
    return Batch([k for batch in batches for k in batch.numbers], torch.cat([batch.noise for batch in batches]), state)


def split(batch: Batch, at_once: int) -> Iterator[Batch]:
    """The same candidates, so many at a time."""
    for first in range(0, len(batch.numbers), at_once):
        yield batch.take(list(range(first, min(first + at_once, len(batch.numbers)))))


def total_steps(count: int, sampling: Sampling, cuts: tuple[Cut, ...]) -> int:
    """Steps of all batches."""
    ends = [*(cut.after for cut in cuts), sampling.table.steps]
    counts = [count, *(cut.keep for cut in cuts)]
    parts = zip(counts, [0, *ends[:-1]], ends, strict=True)
    return sum(-(-alive // sampling.at_once) * (stop - begin) for alive, begin, stop in parts)
