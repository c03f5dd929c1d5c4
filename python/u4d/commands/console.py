"""What the verbs share about the terminal: progress bars, tables, and quiet libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

NOISY = ("diffusers", "transformers", "huggingface_hub", "torch", "accelerate")


def use_all_cores() -> None:
    """Give torch the cores that this process may use, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine's under taskset and in many containers."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the chatter of model libraries off the terminal; their errors still come as exceptions."""
    from diffusers.utils import logging as diffusers_logging

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    if find_spec("transformers") is not None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            for library in NOISY:
                warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        diffusers_logging.set_verbosity(verbosity)


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Print what the package logs ("5 images were left out") as one line each."""
    log = logging.getLogger("u4d")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("u4d: note: %(message)s"))
    log.addHandler(handler)
    propagated, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagated


class Bars:
    """Progress bars, one per stage, on a terminal only; call it as `bars(stage, done, total)`."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.stage = ""
        self.bar: tqdm[Any] | None = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        from tqdm import tqdm

        if self.bar is None or stage != self.stage:
            self.close()
            self.stage = stage
            self.bar = tqdm(total=total, desc=stage, unit=self.unit, disable=None, leave=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def format_facts(facts: Sequence[tuple[str, str]]) -> str:
    """(name, value) pairs as two columns."""
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A header and rows: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
