"""Runs for tests: what their folders hold, runs that are stopped, and runs of several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import u4d.train.loop as loop
from u4d.data.images import write_png
from u4d.train.recipe import Recipe
from u4d.train.settings import to_json

IN_PROCESSES = """
import sys
from pathlib import Path
from u4d.train.loop import train
from u4d.train.settings import from_json

train(from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), workers=0, progress=False)
"""


class Stopped(Exception):
    """The run was stopped on purpose."""


def train(recipe: Recipe, run: Path) -> Path:
    """A run in this process, without a bar and without workers."""
    return loop.train(recipe, run, workers=0, progress=False)


def train_until(recipe: Recipe, run: Path, step: int) -> None:
    """A run that is stopped at the beginning of that step."""
    real = loop.draw_samples

    def stop(recipe: Recipe, now: int, *others: Any) -> Any:
        if now == step:
            raise Stopped
        return real(recipe, now, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_samples", stop)
        with pytest.raises(Stopped):
            train(recipe, run)


def train_in_processes(recipe: Recipe, run: Path, processes: int) -> None:
    """A run under torchrun, on the CPU."""
    run.parent.mkdir(parents=True, exist_ok=True)
    script, wanted = run.with_name(run.name + ".py"), run.with_name(run.name + ".json")
    script.write_text(IN_PROCESSES)
    wanted.write_text(to_json(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), str(script), str(wanted), str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr


def write_pictures(folder: Path, caption: str) -> None:
    """A clip of six random pictures in the sizes of `debug`, and what is said of it."""
    folder.mkdir(parents=True)
    pictures = np.random.default_rng(len(caption)).integers(0, 256, (6, 32, 48, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        write_png(folder / f"{number}.png", picture)
    folder.with_name(f"{folder.name}.txt").write_text(caption)


def losses(run: Path) -> Tensor:
    """`[steps,4]` of the log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "grad_norm" in line])


def saved(run: Path) -> dict[str, Any]:
    """The newest saved state: model, average and optimizer."""
    newest = max((run / "state").glob("step_????????"))
    plain = run.with_name(run.name + "-state.pt")
    dcp_to_torch_save(newest, plain)
    state: dict[str, Any] = torch.load(plain, weights_only=False)
    return state


def same_bits(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether model and average of two states are equal."""
    return all(
        mine[part].keys() == theirs[part].keys()
        and all(torch.equal(tensor, theirs[part][name]) for name, tensor in mine[part].items())
        for part in ("model", "average")
    )


def weight_difference(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Root mean square over all weights of model and average of two states."""
    squares = [
        (tensor - theirs[part][name]).double().square().flatten()
        for part in ("model", "average")
        for name, tensor in mine[part].items()
    ]
    return float(torch.cat(squares).mean().sqrt())


def gradient_norms(run: Path) -> torch.Tensor:
    """Of every step that a run has logged."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return torch.tensor([line["grad_norm"] for line in lines if "grad_norm" in line])
