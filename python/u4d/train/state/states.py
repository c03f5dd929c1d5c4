"""Exact resume: a run's weights, average and optimiser, saved while it goes on, restored by any number of processes.

All randomness derives from (seed, step), so nothing else has to be saved. The files are those of
`torch.distributed.checkpoint` (DCP) beside a manifest (`state_folder`). DCP describes its files by a pickle: restore
only states of your own.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save

from u4d.errors import UserError
from u4d.train.state.folder import (
    PARTIAL,
    FileRecord,
    Manifest,
    check_hashes,
    check_identity,
    check_sizes,
    own_files,
    prune,
    publish,
    read_manifest,
    record_files,
    remove_leftovers,
    saved_states,
    state_name,
    write_manifest,
)
from u4d.train.state.parts import Parts, ignore_single_process_warnings, load_parts, reason, state_of
from u4d.train.world import World

__all__ = ["Parts", "States"]

Result = TypeVar("Result")
logger = logging.getLogger(__name__)
PATIENCE = timedelta(hours=2)  # of a process that waits for the others' writing


class States:
    """The saved states of a run, the last `keep` of them. Every process makes one and calls the same in the same order.

    In a `with` block, whose end waits for a write that is under way. The group of processes must outlive it.

    Args:
        folder: holds `step_00001200/` and so on; all processes see the same.
        keep: how many states stay.
        world: the processes.
        identity: what a run must have in common with the one that wrote a state, by name.
    """

    def __init__(self, folder: Path, keep: int, world: World, identity: dict[str, str]) -> None:
        if keep < 1:
            raise UserError(f"keep: expected at least 1 state to be kept, got {keep}")
        self.folder, self.keep, self.world, self.identity = folder, keep, world, identity
        # A group of its own, on the CPU: writing in the background must not mix with the training's communication.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None
        self._staging = StagingOptions(world.device.type == "cuda", False, False, False)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")  # Python's end waits for it
        self._pending: Future[None] | None = None
        self._damaged: set[str] = set()
        ignore_single_process_warnings()

    def __enter__(self) -> States:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError:  # it was logged
            if kind is None:
                raise

    def save(self, step: int, parts: Parts) -> None:
        """Copy the state to the CPU, then write it in the background; waits for the save before.

        Args:
            step: steps done.
            parts: they may change as soon as this returns.
        Raises:
            UserError: the save before could not be written.
        """
        self.wait()
        staged = DefaultStager(self._staging).stage(state_of(parts))  # torch 2.11's can be used once only
        assert isinstance(staged, dict)
        self._pending = self._writer.submit(self._write_or_explain, step, staged)

    def wait(self) -> None:
        """Until what was saved is on the disk.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, parts: Parts) -> int:
        """Load the newest whole state; damaged ones are named in a warning and left as they are.

        Returns:
            the steps done, 0 where nothing was saved yet; `parts` are then as they were.
        Raises:
            UserError: all states are damaged; or the newest whole one is another run's, or of another model.
        """
        self.wait()
        self._damaged.clear()
        self._together(lambda: remove_leftovers(self.folder) if self.world.main else None)
        for path in self._together(lambda: saved_states(self.folder))[0]:
            try:
                manifest = self._verify(path)
            except OSError as error:
                self._damaged.add(path.name)
                if self.world.main:
                    logger.warning("damaged state, the one before it is tried: %s", error)
                continue
            self._load(path, parts)
            return manifest.step
        if self._damaged:
            names = ", ".join(sorted(self._damaged))
            raise UserError(
                f"{self.folder}: no whole state to go on from, all are damaged ({names}; see the warnings); "
                "bring a copy back, or delete them to start again"
            )
        return 0

    def _verify(self, path: Path) -> Manifest:
        """Raise OSError for a damaged state, UserError for another run's. Each process reads its share of the files."""

        def manifest_and_sizes() -> Manifest:
            manifest = read_manifest(path)
            check_sizes(path, manifest.files)
            return manifest

        manifest = self._together(manifest_and_sizes)[0]
        check_identity(path, manifest.identity, self.identity)
        mine = dict(list(manifest.files.items())[self.world.rank :: self.world.size])
        self._together(lambda: check_hashes(path, mine))
        return manifest

    def _load(self, path: Path, parts: Parts) -> None:
        try:
            load_parts(path, parts, self._group)
        except CheckpointException as error:
            raise UserError(f"{path}: does not fit this model and optimizer: {reason(error)}") from error

    def _write_or_explain(self, step: int, state: dict[str, Any]) -> None:
        try:
            self._write(step, state)
        except (OSError, RuntimeError, CheckpointException) as error:  # RuntimeError: another process is gone
            message = f"{self.folder}: the state of step {step} could not be written: {reason(error)}"
            logger.error(message)
            raise UserError(f"{message}; the states before it are as they were") from error

    def _write(self, step: int, state: dict[str, Any]) -> None:
        final = self.folder / state_name(step)
        partial = final.with_name(final.name + PARTIAL)
        if self.world.main:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            writer = FileSystemWriter(partial)  # it syncs its files
            save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            records = self._together(lambda: record_files(partial, own_files(partial, self.world.rank)))
            self._together(lambda: self._publish(step, partial, final, records) if self.world.main else None)
        except (OSError, CheckpointException):
            if self.world.main:  # the disk may be full
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _publish(self, step: int, partial: Path, final: Path, records: list[dict[str, FileRecord]]) -> None:
        files = {name: record for part in records for name, record in part.items()}
        write_manifest(partial, Manifest(step, self.identity, self.world.size, files))
        publish(partial, final)
        self._damaged.discard(final.name)
        prune(self.folder, self.keep, self._damaged)

    def _together(self, action: Callable[[], Result]) -> list[Result]:
        """Do it in every process; the results, by rank. An OSError in one is one in all, once all are done."""
        mine: tuple[Any, str | None]
        try:
            mine = (action(), None)
        except OSError as error:
            mine = (None, str(error))
        everyone: list[tuple[Any, str | None]] = [mine]
        if self._group is not None:
            everyone = [mine] * self.world.size
            dist.all_gather_object(everyone, mine, group=self._group)
        for _, error_text in everyone:
            if error_text is not None:
                raise OSError(error_text)
        results: list[Result] = [result for result, _ in everyone]
        return results
