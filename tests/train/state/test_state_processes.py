"""States between processes: an interpreter that ends while one is written, and two processes that share one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from state_samples import IDENTITY, assert_equal, change, everything, make_parts, names, open_states

import u4d.train.state.states as state_module
from u4d.train.state.folder import read_manifest
from u4d.train.state.states import States
from u4d.train.world import start_world


@pytest.mark.slow
def test_the_interpreter_ends_after_the_write(tmp_path: Path) -> None:
    done = launch([sys.executable], "end", tmp_path)
    assert done.returncode == 0, done.stderr
    assert open_states(tmp_path).restore(make_parts(1)) == 1


def launch(program: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*program, __file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


@pytest.mark.slow
def test_two_processes_and_one_exchange_states(tmp_path: Path) -> None:
    """One saves, two restore it, go on and save, and one restores that: every number is the same on both sides."""
    parts = make_parts(0)
    change(parts, 0)
    torch.save(everything(parts), tmp_path / "one.pt")
    with open_states(tmp_path / "one") as states:
        states.save(1, parts)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = launch(torchrun, "exchange", tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "two" / "step_00000002").processes == 2
    assert {"__0_0.distcp", "__1_0.distcp"} < set(names(tmp_path / "two" / "step_00000002"))
    other = make_parts(2)
    assert open_states(tmp_path / "two").restore(other) == 2
    assert_equal(everything(other), torch.load(tmp_path / "two.pt"))
    assert len(re.findall(r"damaged state, .*step_00000003/__1_0\.distcp: its contents", done.stderr)) == 1


def save_and_end(folder: Path) -> None:
    """The interpreter ends while the state is being written."""
    real = state_module.record_files

    def sleep_and_record(*arguments: Any) -> Any:
        time.sleep(1)
        return real(*arguments)

    state_module.record_files = sleep_and_record
    parts = make_parts(0)
    change(parts, 0)
    open_states(folder).save(1, parts)
    assert not (folder / "step_00000001").exists()


def exchange(folder: Path) -> None:
    """What each of two processes does."""
    with start_world("cpu") as world:
        parts = make_parts(1, sharded=True)
        with States(folder / "one", 2, world, IDENTITY) as states:
            assert states.restore(parts) == 1
        assert_equal(everything(parts), torch.load(folder / "one.pt"))
        change(parts, 1)
        expected = everything(parts)
        with States(folder / "two", 2, world, IDENTITY) as states:
            states.save(2, parts)
            change(parts, 2)
            states.save(3, parts)
            states.wait()
            if world.main:
                torch.save(expected, folder / "two.pt")
                path = folder / "two" / "step_00000003" / "__1_0.distcp"  # what the other process checks
                path.write_bytes(bytes(reversed(path.read_bytes())))
            world.wait()
            assert states.restore(parts) == 2
            assert_equal(everything(parts), expected)
            world.wait()
            if world.main:
                shutil.rmtree(folder / "two" / "step_00000003")
        adapters = make_parts(1, lora=True, sharded=True)
        change(adapters, 1)
        expected = everything(adapters)
        with States(folder / "adapters", 2, world, IDENTITY) as states:
            states.save(1, adapters)
            change(adapters, 2)
            assert states.restore(adapters) == 1
        assert_equal(everything(adapters), expected)


if __name__ == "__main__":
    {"end": save_and_end, "exchange": exchange}[sys.argv[1]](Path(sys.argv[2]))
