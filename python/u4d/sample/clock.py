"""Seconds per stage of a completion."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds per stage; a stage within another one counts for itself alone.

    Work that a GPU still has to do when a stage ends is waited for, so that it counts where it was asked for.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = 0.0  # seconds of stages within the one that runs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a block; the same name adds up."""
        outer, self.inner, began = self.inner, 0.0, time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        spent = time.perf_counter() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + spent - self.inner
        self.inner = outer + spent
