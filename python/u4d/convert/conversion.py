"""What a conversion did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, int, int], None]  # what is being written, bytes done, bytes in all
SHARD_BYTES = 2_000_000_000


def no_progress(part: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Conversion:
    """The outcome of `init_from_wan` or `extract_stream`.

    Attributes:
        source: what was read, in words.
        out: the new folder.
        made: (part, what it is) of everything that was written.
        left_out: (what, why) of everything that could not be taken over.
        num_bytes, num_files: size of the new folder.
    """

    source: str
    out: Path
    made: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...]
    num_bytes: int
    num_files: int


def folder_size(folder: Path) -> tuple[int, int]:
    """Bytes and number of the files under a folder."""
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return sum(sizes), len(sizes)
