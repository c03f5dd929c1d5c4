"""Folders of saved states: their names, and the manifest by which a whole one is told from a damaged one.

A state is written as `step_00001200.partial` and renamed when all of it, the manifest last, is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from u4d.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1
PARTIAL, REPLACED = ".partial", ".replaced"
NAME = re.compile(r"step_(\d{8,})")
DIGEST_BYTES = 16


class DamagedStateError(OSError):
    """A saved state is not what was written. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class FileRecord:
    """What a file of a state was when it was written."""

    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Manifest:
    """What a saved state is.

    Attributes:
        step: steps done.
        identity: what a run that goes on from here must have in common with the one that wrote it, by name.
        processes: how many wrote it; any other number may read it.
        files: all other files of the folder, by name.
    """

    step: int
    identity: dict[str, str]
    processes: int
    files: dict[str, FileRecord]


def state_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step_{step:08d}"


def saved_states(folder: Path) -> list[Path]:
    """Folders of finished states, newest first; whether they are whole is not known yet."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a process that died while it saved has left."""
    for suffix in (PARTIAL, REPLACED):
        for path in folder.glob(f"step_*{suffix}"):
            shutil.rmtree(path)


def own_files(folder: Path, rank: int) -> list[str]:
    """Files that a process has written: those of its rank, and for the first also those that belong to none."""
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))]


def record_files(folder: Path, names: Collection[str]) -> dict[str, FileRecord]:
    """Sizes and hashes of those files."""
    return {name: FileRecord((folder / name).stat().st_size, file_hash(folder / name)) for name in names}


def file_hash(path: Path) -> str:
    """Hexadecimal blake2b of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with a hash of itself, and wait until it is on the disk."""
    fields = {"version": VERSION, **asdict(manifest)}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**fields, "blake2b": fields_hash(fields)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a state.

    Raises:
        DamagedStateError: it is missing, or not as it was written.
    """
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
        digest = fields.pop("blake2b")
        if digest != fields_hash(fields):
            raise DamagedStateError(f"{path}: its contents have changed since it was written")
        if fields.pop("version") != VERSION:
            raise DamagedStateError(f"{path}: written by another version of u4d")
        files = {name: FileRecord(**record) for name, record in fields.pop("files").items()}
        return Manifest(files=files, **fields)
    except FileNotFoundError as error:
        raise DamagedStateError(f"{path}: missing") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedStateError(f"{path}: no manifest: {error}") from error


def fields_hash(fields: Mapping[str, Any]) -> str:
    """Hash of a JSON object, whatever the order of its fields."""
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise DamagedStateError at the first file that is missing or of another size. Quick: nothing is read."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedStateError(f"{path}: missing")
        if path.stat().st_size != record.bytes:
            raise DamagedStateError(f"{path}: expected {record.bytes} bytes, got {path.stat().st_size}")


def check_hashes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise DamagedStateError at the first file whose bytes are not those that were written."""
    for name, record in files.items():
        if file_hash(folder / name) != record.blake2b:
            raise DamagedStateError(f"{folder / name}: its contents have changed since it was written")


def check_identity(folder: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise UserError unless a state belongs to the run that wants it; all that differs is named."""
    differing = [
        f"{name}: expected {expected.get(name, 'none')!r}, got {found.get(name, 'none')!r}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differing:
        raise UserError(
            f"{folder}: this state belongs to another run: {'; '.join(differing)}; "
            "choose a new folder, or bring back what that run was made with"
        )


def publish(partial: Path, final: Path) -> None:
    """Give a state that is wholly on the disk its name. One of the same step, damaged before, goes then."""
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(folder: Path, keep: int, spared: Collection[str]) -> None:
    """Delete all but the newest `keep` states; those in `spared`, by name, neither count nor go."""
    counted = [path for path in saved_states(folder) if path.name not in spared]
    for path in counted[keep:]:
        shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
