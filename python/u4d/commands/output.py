"""Outputs that are checked before long work and appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from u4d.errors import UserError


class _Rehearsed(Exception):
    """Ends the rehearsal of `check_scene_output`."""


def check_scene_output(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless a scene can be saved to `folder`; leaves everything as it was.

    It is a rehearsal: the temporary folder that saving makes is made and removed. Permission bits alone don't tell
    (root, read-only mounts).
    """
    from u4d.data.atomic import new_folder
    from u4d.data.scene_folder import MARKER

    try:
        with new_folder(folder, MARKER, overwrite):
            raise _Rehearsed
    except _Rehearsed:
        return


def check_run_output(folder: Path, marker: str) -> None:
    """Raise UserError unless a run may be started or continued in `folder`; leaves everything as it was.

    Args:
        folder: the run's folder; one that is not empty must hold `marker`.
        marker: the file by which a run folder is known.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder to write to, got a file; choose another output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(f"{folder}: expected a new folder or an older run, got one with other files; choose another")
    _check_writable(folder)


def check_file_output(path: Path) -> None:
    """Raise UserError unless a file can be written at `path`; leaves everything as it was."""
    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, got a folder")
    _check_writable(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file so that an older one stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_writable(folder: Path) -> None:
    """Make and remove a folder in `folder`, or in the nearest parent that is there."""
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".u4d."):
            pass
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise UserError(f"{folder}: expected a place that can be written to, got: {why}; choose another") from error
