"""The new folder of a conversion: where it may stand, what is copied into it, and its index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from u4d.checkpoint import INDEX
from u4d.checkpoint_files import weight_files
from u4d.convert.shards import PlannedTensor, write_weights
from u4d.errors import UserError

SMALL_FILES = (".json", ".model", ".txt")  # configurations, tokenizers; the index of shards goes with the weights
CHUNK = 16 << 20


def check_place(out: Path, source: Path, needed: int) -> None:
    """Raise UserError where the result would replace its source, or would not fit on the disk.

    Args:
        out: the folder to be made.
        source: what is read.
        needed: bytes.
    """
    target, origin = out.resolve(), source.resolve()
    if target == origin or target in origin.parents:
        raise UserError(f"{out}: expected a place outside SOURCE, got one that would replace it; choose another output")
    nearest = next(place for place in (target, *target.parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(
            f"{out}: expected {needed / 1e9:.1f} GB of free space, got {free / 1e9:.1f} GB; choose another output"
        )


def part_files(folder: Path, weights: str | None) -> list[Path]:
    """The files of a component that are copied: its weights, and what is small and no code.

    Args:
        folder: the component's.
        weights: name of the weight file where there is only one; None for a component without weights.
    """
    large = [] if weights is None else weight_files(folder, weights)
    small = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in SMALL_FILES]
    return [*large, *(file for file in small if file not in large and not file.name.endswith(".index.json"))]


def copy_part(files: list[Path], target: Path, progress: Callable[[int, int], None]) -> None:
    """Copy a component's files byte for byte into a new folder; progress(bytes done, bytes in all)."""
    target.mkdir()
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        with open(file, "rb") as read, open(target / file.name, "wb") as written:
            while chunk := read.read(CHUNK):
                done += written.write(chunk)
                progress(done, total)


def write_model(
    folder: Path,
    make: Callable[[], Any],
    tensors: Mapping[str, PlannedTensor],
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write the configuration of the diffusers model that `make` builds, and its weights."""
    folder.mkdir()
    with torch.device("meta"):
        make().save_config(folder)
    write_weights(folder, tensors, shard_bytes, progress)


def write_index(folder: Path, class_name: str, entries: Mapping[str, Any]) -> None:
    """Write `model_index.json` as diffusers does."""
    import diffusers

    index = {"_class_name": class_name, "_diffusers_version": diffusers.__version__, **entries}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
