"""Runs killed by SIGKILL at random moments, also while they save, and started again: as if they had never been killed.

The file is also the program that is killed. Its saves are slowed down, so that many moments lie within one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import u4d.train.state.states as state_module
from u4d.train.recipe import debug_run
from u4d.train.state.folder import saved_states
from u4d.train.state.parts import load_weights
from u4d.train.state.states import Parts, States
from u4d.train.world import World

KILLS = 4
STEPS, SAVE_EVERY = 40, 2
SECONDS_OF_A_SAVE = 0.3


def run_small(folder: Path) -> None:
    """A loop with all that a training has: weights, their average, moments, data drawn from (seed, step)."""
    torch.manual_seed(0)
    model, average = small_model(), small_model()
    average.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts = Parts(model, average, optimizer)
    with States(folder / "state", 2, World(torch.device("cpu")), {"recipe": "small"}) as states:
        for step in range(states.restore(parts), STEPS):
            inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(inputs) - inputs.roll(1, 1)).square().mean().backward()
            optimizer.step()
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.data.lerp_(theirs.data, 0.1)
            time.sleep(0.02)
            if (step + 1) % SAVE_EVERY == 0:
                states.save(step + 1, parts)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def run_training(folder: Path) -> None:
    """The real thing, in the sizes of `u4d train debug`."""
    from u4d.train.loop import train

    recipe = debug_run()
    phases = (replace(recipe.phases[0], steps=STEPS),)
    watch = replace(recipe.watch, save_every=SAVE_EVERY)
    train(replace(recipe, phases=phases, watch=watch), folder, workers=0, progress=False)


PROGRAMS = {"small": run_small, "training": run_training}


def slow_down() -> None:
    """Half of a save's time passes before its files are written, half before its manifest is."""
    write_data, record_files = FileSystemWriter.write_data, state_module.record_files

    def sleep_and_write(*arguments: Any) -> Any:
        time.sleep(SECONDS_OF_A_SAVE / 2)
        return write_data(*arguments)

    def sleep_and_record(*arguments: Any) -> Any:
        time.sleep(SECONDS_OF_A_SAVE / 2)
        return record_files(*arguments)

    FileSystemWriter.write_data = sleep_and_write
    state_module.record_files = sleep_and_record


def tell_when_restored() -> None:
    """Print the step that a run goes on from: then the parent's clock starts."""
    real = States.restore

    def restore(self: States, parts: Parts) -> int:
        step = real(self, parts)
        print(step, flush=True)
        return step

    States.restore = restore  # type: ignore[method-assign]


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, program, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def saving(folder: Path) -> bool:
    return any((folder / "state").glob("*.partial"))


def finish(program: str, folder: Path) -> int:
    """Let a run come to its end; returns the step that it went on from."""
    output, errors = (process := start(program, folder)).communicate(timeout=180)
    assert process.returncode == 0, errors
    return int(output.split()[0])


def newest(folder: Path) -> str:
    return max((path.name for path in saved_states(folder / "state")), default="")


def kill(program: str, folder: Path, *, early: bool, during_a_save: bool, seconds: float) -> int:
    """Start a run and kill it; returns the step it went on from.

    Args:
        program, folder: the run.
        early: before it may have saved anything; otherwise it saves once in peace.
        during_a_save: wait for one to begin.
        seconds: wait as long then.
    """
    process, before = start(program, folder), newest(folder)
    assert process.stdout is not None
    first = process.stdout.readline()
    while process.poll() is None and not early and newest(folder) == before:
        time.sleep(0.002)
    while process.poll() is None and during_a_save and not saving(folder):
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    return int(first)


def weights(program: str, folder: Path) -> dict[str, Tensor]:
    """Weights, average and moments of the last state, and of a training also what it has made."""
    last = saved_states(folder / "state")[0]
    assert last.name == f"step_{STEPS:08d}"
    if program == "small":
        found = {}
        for part in ("model", "average"):
            load_weights(last, model := small_model(), part)
            found |= {f"{part}.{name}": tensor for name, tensor in model.state_dict().items()}
        return found
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(last, folder / "state.pt")
    state = torch.load(folder / "state.pt", weights_only=False)
    found = {f"{part}.{name}": tensor for part in ("model", "average") for name, tensor in state[part].items()}
    for name, moments in state["optimizer"]["state"].items():
        found |= {f"{kind}.{name}": tensor for kind, tensor in moments.items()}
    return found | load_file(folder / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_killed_at_any_moment_ends_as_if_it_never_was(program: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(program, whole) == 0
    chance, hits, begun = random.Random(4), 0, []
    for attempt in range(KILLS):
        during_a_save = attempt % 2 == 1
        seconds = chance.uniform(0, SECONDS_OF_A_SAVE * (1 if during_a_save else 3))
        begun.append(kill(program, killed, early=attempt == 0, during_a_save=during_a_save, seconds=seconds))
        hits += saving(killed)
    begun.append(finish(program, killed))
    assert hits >= 1, "no kill hit a save"
    assert begun == sorted(begun) and 0 < begun[-1] < STEPS, begun
    assert not saving(killed)
    mine, theirs = weights(program, whole), weights(program, killed)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


if __name__ == "__main__":
    tell_when_restored()
    if Path(sys.argv[2]).name == "killed":
        slow_down()
    PROGRAMS[sys.argv[1]](Path(sys.argv[2]))
