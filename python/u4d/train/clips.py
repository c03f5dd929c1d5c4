"""Rendered training clips, a window at a time, in an order that depends on (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from u4d.clips import Clips, join
from u4d.data.procedural import render_clips

RENDER_CHUNK = 8
COMPILE_FROM = 32  # clips: below this, compiling the tracer takes longer than it saves


class RenderedWindows(Dataset[Clips]):
    """Item w holds `window` freshly rendered clips of the training split."""

    def __init__(self, window: int, frames: int, image_size: tuple[int, int], windows: int) -> None:
        self.window, self.frames, self.image_size, self.windows = window, frames, image_size, windows

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> Clips:
        torch.set_num_threads(1)
        return render_window(range(index * self.window, (index + 1) * self.window), self.frames, self.image_size)


def render_window(indices: range, frames: int, image_size: tuple[int, int], split: str = "train") -> Clips:
    """Render those clips in chunks of one shape, so that the compiled tracer is compiled once."""
    compiled = len(indices) >= COMPILE_FROM
    parts = [
        render_clips(
            list(indices[start : start + RENDER_CHUNK]), split=split, frames=frames, size=image_size, compile=compiled
        )
        for start in range(0, len(indices), RENDER_CHUNK)
    ]
    return join(parts)


@dataclass(frozen=True)
class Schedule:
    """Which clips a step uses: windows of clips, each passed over `draws` times in an order of its own."""

    window: int
    batch: int
    draws: int
    seed: int

    @property
    def steps_per_window(self) -> int:
        return self.window * self.draws // self.batch

    def positions(self, step: int) -> torch.Tensor:
        """Positions in its window of the clips of that step: `[batch]`."""
        window, offset = divmod(step, self.steps_per_window)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + window)
        order = torch.cat([torch.randperm(self.window, generator=generator) for _ in range(self.draws)])
        return order[offset * self.batch : (offset + 1) * self.batch]


def batches(
    schedule: Schedule, frames: int, image_size: tuple[int, int], start: int, stop: int, workers: int
) -> Iterator[Clips]:
    """The clips of steps start..stop-1. The next window is rendered by worker processes meanwhile."""
    first, last = start // schedule.steps_per_window, (stop - 1) // schedule.steps_per_window
    windows = RenderedWindows(schedule.window, frames, image_size, last + 1)
    loader = DataLoader(
        windows,
        batch_size=None,
        sampler=range(first, last + 1),
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        multiprocessing_context="spawn" if workers else None,
    )
    step = start
    for window in loader:
        while step < stop and step // schedule.steps_per_window == first:
            positions = schedule.positions(step)
            yield window.map(lambda part, positions=positions: part[positions])
            step += 1
        first += 1
