"""What tests of the command line share: the outcome of a command, and folders compared byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FRAMES, SIZE = 6, (32, 48)  # what the debug checkpoint takes


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, and empty folders too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}
