"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from u4d.errors import UserError


class OutputExistsError(UserError, FileExistsError):
    """An output is in the way; nothing was changed."""


def check_output_folder(folder: Path, marker: str, overwrite: bool) -> None:
    """Raise unless a result may be put at `folder`. Long work calls this before it starts.

    Args:
        folder: where the result shall be.
        marker: the file by which an older result of the same kind is known.
        overwrite: may an older result be replaced?
    Raises:
        OutputExistsError: an older result, and `overwrite` is not set.
        UserError: a file, or a folder that is not empty and holds no `marker`: that is somebody else's.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(f"{folder}: expected a folder to write to, got a file; choose another output")
        empty = not any(folder.iterdir())
        older = (folder / marker).is_file()
    except OSError as error:
        raise _unwritable(folder, error) from error
    if empty:
        return
    if not older:
        raise UserError(
            f"{folder}: expected a new or empty folder, got one that holds other files and no {marker}; "
            "it is never overwritten: choose another output"
        )
    if not overwrite:
        raise OutputExistsError(
            f"{folder}: holds an older result; choose another output, or replace it with overwrite=True "
            "(--overwrite on the command line)"
        )


@contextmanager
def new_folder(folder: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """Give an empty temporary folder beside `folder`; when the block ends well it takes the place of `folder`.

    When the block fails or is interrupted, the temporary folder and any parents made for it are removed, and what
    stood at `folder` is as it was.

    Args:
        folder: where the result shall be; a link is followed.
        marker: the file by which an older result of the same kind is known.
        overwrite: may an older result be replaced?
    Raises:
        UserError: as `check_output_folder`, or nothing can be written there.
    """
    folder = folder.resolve()
    check_output_folder(folder, marker, overwrite)
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    made = _make(temporary)
    try:
        yield temporary
        _swap(temporary, folder, marker, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise


def _swap(temporary: Path, folder: Path, marker: str, overwrite: bool) -> None:
    """Put `temporary` where `folder` is or was; the older folder goes only once the new one stands."""
    check_output_folder(folder, marker, overwrite)  # the work took its time: somebody may have written there
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = temporary.with_suffix(".older")
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside)


def _make(temporary: Path) -> list[Path]:
    """Make the folder; return the parents that had to be made too, deepest first."""
    missing: list[Path] = []
    try:
        missing = [parent for parent in temporary.parents if not parent.exists()]
        temporary.mkdir(parents=True)
    except OSError as error:
        _remove_empty(missing)
        raise _unwritable(temporary.parent, error) from error
    return missing


def _remove_empty(parents: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not there, or by now somebody else's: then it stays
        for parent in parents:
            parent.rmdir()


def _unwritable(folder: Path, error: OSError) -> UserError:
    why = (error.strerror or str(error)).lower()
    return UserError(f"{folder}: expected a place that can be written to, got: {why}; choose another output")
