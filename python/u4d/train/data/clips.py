"""Data lanes: which clip is used at which step and place, and the worker processes that make the clips meanwhile.

Place j has a lane of its own. Window w of lane j is the clips number (w * window + i) * batch + j, i < window; each is
used in `draws` passes in random order. So what a place sees depends neither on the number of processes nor on that of
workers, and a process makes the clips of its own lanes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from u4d.errors import UserError
from u4d.train.data.samples import TrainingClips, generator
from u4d.train.data.sources import ReadClips, Sources, join_clips, read_clips
from u4d.train.recipe import Recipe

Item = TypeVar("Item")
ENOUGH = 48  # clips tried before their share of bad ones means anything


@dataclass(frozen=True)
class Lanes:
    """Which clips the places use."""

    window: int
    draws: int
    batch: int
    seed: int

    @property
    def steps_per_window(self) -> int:
        """Each step takes one clip of each lane's window."""
        return self.window * self.draws

    def numbers(self, window: int, place: int) -> list[int]:
        """The clips of a lane's window."""
        return [(window * self.window + i) * self.batch + place for i in range(self.window)]

    def position(self, step: int, place: int) -> int:
        """Which clip of its window a place uses at a step."""
        window, offset = divmod(step, self.steps_per_window)
        passed, offset = divmod(offset, self.window)
        own = generator("lane", self.seed, place, window, passed)
        return int(torch.randperm(self.window, generator=own)[offset])


@dataclass(frozen=True)
class Windows(Dataset[ReadClips]):
    """Item (window, lanes) is the clips of those lanes' windows, lane by lane."""

    sources: Sources
    lanes: Lanes

    def __getitem__(self, item: tuple[int, range]) -> ReadClips:
        window, places = item
        with one_thread():
            numbers = [number for place in places for number in self.lanes.numbers(window, place)]
            return read_clips(self.sources, numbers)


@contextmanager
def one_thread() -> Iterator[None]:
    """Workers that all use all cores get in each other's way; the clips are then the same with and without workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ClipCounter:
    """Counts clips that could be read and those that could not, and stops the run at too many of these.

    It counts from the start of this process: a run that goes on begins at 0, and mended data is not held against it.
    """

    def __init__(self, most_bad: float) -> None:
        self.most_bad, self.read, self.bad = most_bad, 0, 0

    def count(self, read: ReadClips) -> TrainingClips:
        """The clips, if all is well.

        Raises:
            UserError: too many clips can't be read; the last one is named.
        """
        self.read += 0 if read.clips is None else len(read.clips.numbers)
        self.bad += len(read.bad)
        tried = self.read + self.bad
        if read.clips is None or (tried >= ENOUGH and self.bad > self.most_bad * tried):
            raise UserError(
                f"data: {self.bad} of {tried} clips could not be read, at most {self.most_bad:.1%} may "
                f"(data.most_bad); the last one: {read.bad[-1] if read.bad else 'see above'}"
            )
        return read.clips


def batches(
    recipe: Recipe, sources: Sources, places: range, start: int, workers: int, counter: ClipCounter
) -> Iterator[TrainingClips]:
    """The clips of some places, at full length, for steps start .. recipe.steps - 1.

    The next window is made by worker processes meanwhile; without any it is made in this process when it is needed.

    Raises:
        UserError: too many clips can't be read.
    """
    lanes = Lanes(recipe.data.window, recipe.data.draws, recipe.batch, recipe.seed)
    first, last = start // lanes.steps_per_window, (recipe.steps - 1) // lanes.steps_per_window
    shares = share_out(places, max(1, workers))
    loader = DataLoader(
        Windows(sources, lanes),
        batch_size=None,
        sampler=[(window, share) for window in range(first, last + 1) for share in shares],
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        multiprocessing_context="spawn" if workers else None,
    )
    parts = iter(loader)
    for window in range(first, last + 1):
        clips = join_clips([counter.count(next(parts)) for _ in shares])
        begin = window * lanes.steps_per_window
        for step in range(max(start, begin), min(recipe.steps, begin + lanes.steps_per_window)):
            rows = [row * lanes.window + lanes.position(step, place) for row, place in enumerate(places)]
            yield clips.pick(torch.tensor(rows))


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made by a thread while its predecessor is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="samples") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def share_out(places: range, workers: int) -> list[range]:
    """Neighbouring lanes for each worker; fewer shares than workers where there are few lanes."""
    size = -(-len(places) // workers)
    return [places[first : first + size] for first in range(0, len(places), size)]
