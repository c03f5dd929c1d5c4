"""Saved states: bit for bit what was saved, by any number of processes; damaged ones are found, named and passed over.

The file is also the program of the processes that `torchrun` starts.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from state_samples import IDENTITY, NEVER_TRAINED, assert_equal, change, everything, make_parts, names, open_states
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

import u4d.train.state.states as state_module
from u4d.errors import UserError
from u4d.train.state.folder import MANIFEST
from u4d.train.state.states import States
from u4d.train.world import World


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """A folder with the states of steps 1 and 2, and what was in them."""
    folder = tmp_path_factory.mktemp("saved") / "state"
    parts, seen = make_parts(0), []
    with open_states(folder) as states:
        for step in (1, 2):
            change(parts, step)
            seen.append(everything(parts))
            states.save(step, parts)
            change(parts, 100)  # at once: what is saved must be a copy
    return folder, seen


def test_a_state_is_restored_bit_for_bit(saved: tuple[Path, list[dict[str, Tensor]]]) -> None:
    folder, seen = saved
    parts = make_parts(1)
    parts.optimizer.param_groups[0]["lr"] = 7.0
    assert open_states(folder).restore(parts) == 2
    assert_equal(everything(parts), seen[1])
    assert [group["lr"] for group in parts.optimizer.param_groups] == [1e-2, 1e-2]
    untouched = [name for name, _ in parts.model.named_parameters() if name.startswith(NEVER_TRAINED)]
    assert untouched and not any(f"exp_avg.{name}" in seen[1] for name in untouched)
    change(parts, 3)
    assert all(torch.isfinite(tensor).all() for tensor in everything(parts).values())


def test_going_on_equals_never_having_stopped(tmp_path: Path) -> None:
    parts, resumed = make_parts(0), make_parts(1)
    change(parts, 0)
    with open_states(tmp_path) as states:
        states.save(1, parts)
    open_states(tmp_path).restore(resumed)
    for step in (1, 2):
        change(parts, step)
        change(resumed, step)
    assert_equal(everything(resumed), everything(parts))


@pytest.mark.gpu
def test_a_state_of_a_gpu_is_restored_there_and_on_a_cpu(tmp_path: Path) -> None:
    """Staging goes through pinned memory, twice the same; what is saved is still a copy."""
    parts, others = make_parts(0, device="cuda"), (make_parts(1, device="cuda"), make_parts(1))
    with States(tmp_path, 2, World(torch.device("cuda")), IDENTITY) as states:
        for step in (1, 2):
            change(parts, step)
            expected = everything(parts)
            states.save(step, parts)
            change(parts, 100)
        assert states.restore(others[0]) == 2
    assert open_states(tmp_path).restore(others[1]) == 2
    for other in others:
        assert_equal(everything(other), expected)


def test_a_folder_without_states_changes_nothing(tmp_path: Path) -> None:
    parts = make_parts(0)
    before = everything(parts)
    assert open_states(tmp_path / "none").restore(parts) == 0
    assert_equal(everything(parts), before)
    assert not (tmp_path / "none").exists()


def test_a_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    parts, other = make_parts(0), make_parts(1)
    with open_states(tmp_path) as states:
        states.save(0, parts)
    change(other, 0)
    assert open_states(tmp_path).restore(other) == 0
    assert not parts.optimizer.state and not other.optimizer.state
    assert_equal(everything(other), everything(parts))


def test_of_adapters_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    parts, other = make_parts(0, lora=True), make_parts(1, lora=True)
    change(parts, 0)
    with open_states(tmp_path) as states:
        states.save(1, parts)
    before, expected = everything(other), everything(parts)
    assert open_states(tmp_path).restore(other) == 1
    found = everything(other)
    adapters = {name for name in found if ".lora_" in name}
    assert len(adapters) > 50
    assert_equal({name: found[name] for name in adapters}, {name: expected[name] for name in adapters})
    frozen = {name for name in before if name not in adapters}
    assert_equal({name: found[name] for name in frozen}, {name: before[name] for name in frozen})
    stored = FileSystemReader(tmp_path / "step_00000001").read_metadata().state_dict_metadata
    assert {name for name in stored if name.startswith(("model.", "average."))} == {
        name for name in adapters if name.startswith(("model.", "average."))
    }


def test_the_last_states_are_kept(tmp_path: Path) -> None:
    parts = make_parts(0)
    with open_states(tmp_path, keep=2) as states:
        for step in (8, 9, 10, 100_000_000):
            states.save(step, parts)
    assert names(tmp_path) == ["step_00000010", "step_100000000"]
    with pytest.raises(UserError, match="keep: expected at least 1"):
        open_states(tmp_path, keep=0)


def test_the_manifest_tells_what_a_state_is(saved: tuple[Path, list[dict[str, Tensor]]]) -> None:
    folder = saved[0] / "step_00000002"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["step"], manifest["identity"], manifest["processes"]) == (2, IDENTITY, 1)
    assert {*manifest["files"], MANIFEST} == {path.name for path in folder.iterdir()}
    assert all(record["bytes"] == (folder / name).stat().st_size for name, record in manifest["files"].items())


def flip_a_byte(folder: Path) -> str:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return r"__0_0\.distcp: its contents have changed"


def cut_short(folder: Path) -> str:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    return r"__0_0\.distcp: expected \d+ bytes, got \d+"


def remove_file(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return r"\.metadata: missing"


def remove_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return r"manifest\.json: missing"


def change_manifest(folder: Path) -> str:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("a digest", "b digest"))
    return r"manifest\.json: its contents have changed"


def empty_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_text("")
    return r"manifest\.json: no manifest"


DAMAGES = [flip_a_byte, cut_short, remove_file, remove_manifest, change_manifest, empty_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], str],
    saved: tuple[Path, list[dict[str, Tensor]]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "state"
    shutil.copytree(saved[0], folder)
    what = damage(folder / "step_00000002")
    parts, states = make_parts(1), open_states(folder)
    assert states.restore(parts) == 1
    assert_equal(everything(parts), saved[1][0])
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert re.search(what, warnings[0].getMessage())
    assert names(folder) == ["step_00000001", "step_00000002"]
    states.save(2, parts)  # the run comes by again: now the damaged one goes
    states.wait()
    assert open_states(folder).restore(make_parts(2)) == 2
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_a_damaged_state_does_not_count_as_kept(saved: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    folder = tmp_path / "state"
    shutil.copytree(saved[0], folder)
    flip_a_byte(folder / "step_00000002")
    with open_states(folder, keep=2) as states:
        states.restore(make_parts(1))
        for step in (3, 4):
            states.save(step, make_parts(1))
    assert names(folder) == ["step_00000002", "step_00000003", "step_00000004"]


def test_where_all_are_damaged_the_run_stops(saved: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    folder = tmp_path / "state"
    shutil.copytree(saved[0], folder)
    for path in folder.iterdir():
        flip_a_byte(path)
    parts = make_parts(1)
    before = everything(parts)
    with pytest.raises(UserError, match=r"no whole state .*step_00000001, step_00000002.*delete them to start again"):
        open_states(folder).restore(parts)
    assert_equal(everything(parts), before)


def test_another_runs_state_is_refused(saved: tuple[Path, list[dict[str, Tensor]]]) -> None:
    with pytest.raises(UserError, match=r"another run: base: expected 'other weights', got ''; choose"):
        open_states(saved[0], base="other weights").restore(make_parts(1))
    with pytest.raises(UserError, match=r"extra: expected 'x', got 'none'; recipe: expected 'r', got 'a digest'"):
        open_states(saved[0], recipe="r", extra="x").restore(make_parts(1))


def test_a_state_of_another_model_is_refused(saved: tuple[Path, list[dict[str, Tensor]]]) -> None:
    parts = make_parts(1)
    parts.model.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"step_00000002: does not fit this model and optimizer: .*extra"):
        open_states(saved[0]).restore(parts)


def test_leftovers_of_a_killed_save_are_removed(saved: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    folder = tmp_path / "state"
    shutil.copytree(saved[0], folder)
    shutil.copytree(folder / "step_00000002", folder / "step_00000003.partial")
    (folder / "step_00000001.replaced").mkdir()
    assert open_states(folder).restore(make_parts(1)) == 2
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_writing_goes_on_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Event(), state_module.record_files

    def wait_and_record(*arguments: Any) -> Any:
        assert go.wait(20)
        return real(*arguments)

    monkeypatch.setattr(state_module, "record_files", wait_and_record)
    states = open_states(tmp_path)
    states.save(5, make_parts(0))
    assert "step_00000005" not in names(tmp_path)
    go.set()
    states.wait()
    assert names(tmp_path) == ["step_00000005"]


def test_an_error_of_the_background_surfaces_at_the_next_call(
    saved: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "state"
    shutil.copytree(saved[0], folder)
    states, parts = open_states(folder), make_parts(0)
    for where in ("write_manifest", "record_files"):
        with monkeypatch.context() as patch:
            patch.setattr(state_module, where, fail)
            states.save(3, parts)
            with pytest.raises(UserError, match=r"step 3 could not be written: .*No space left"):
                states.save(4, parts)
    with monkeypatch.context() as patch:
        patch.setattr(state_module.FileSystemWriter, "write_data", fail)
        states.save(3, parts)
        with pytest.raises(UserError, match=r"step 3 could not be written: .*No space left"):
            states.wait()
    states.wait()  # told once
    assert names(folder) == ["step_00000001", "step_00000002"]
    states.save(4, parts)
    states.wait()
    assert names(folder) == ["step_00000002", "step_00000004"]
