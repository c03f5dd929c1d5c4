"""Several processes compute what one does: the same losses and weights, but for rounding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import u4d
from train.runs import gradient_norms, losses, saved, train, train_in_processes, train_until, weight_difference
from u4d.model.transformer import Transformer
from u4d.train.recipe import Compute, FineTuning, debug_run
from u4d.train.shard import shard_dimension

SAME = 1e-5

# Weights move by 4e-3, 400 times further than they may differ on average. (On average: Adam steps by the gradient's
# sign, more or less, so a weight whose gradient is nearly zero differs by up to a step, from rounding alone.)
RECIPE = replace(
    debug_run(), batch=6, optim=replace(debug_run().optim, lr=1e-3, warmup=1), compute=Compute(precision="fp32")
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the whole batch at once."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(RECIPE, run)
    return run


def assert_same(mine: Path, theirs: Path) -> None:
    """Losses, gradients and weights of two runs."""
    assert torch.allclose(losses(mine), losses(theirs), rtol=SAME, atol=SAME)
    # Adam steps would not tell if gradients were averaged instead of summed.
    assert torch.allclose(gradient_norms(mine), gradient_norms(theirs), rtol=1e-3)
    assert weight_difference(saved(mine), saved(theirs)) < SAME


def test_micro_batches_add_up_to_the_batch(alone: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, compute=Compute(precision="fp32", micro_batch=1))
    train(recipe, tmp_path / "run")
    assert_same(alone, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(alone: Path, tmp_path: Path) -> None:
    """With micro-batches (gradients are added up in each process first), recomputation, and validations in between."""
    run = tmp_path / "run"
    watch = replace(RECIPE.watch, validate_every=2, validation_clips=2)
    compute = Compute(precision="fp32", micro_batch=2, activations="attention")
    train_in_processes(replace(RECIPE, compute=compute, watch=watch), run, 2)
    assert_same(alone, run)
    mine, theirs = (u4d.Pipeline.from_pretrained(folder / "checkpoint").transformer for folder in (alone, run))
    for name, tensor in mine.state_dict().items():
        assert torch.allclose(tensor, theirs.state_dict()[name], rtol=2**-7, atol=SAME), name
    assert set(saved(run)["model"]) == set(Transformer(RECIPE.preset.transformer).state_dict())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone: Path, tmp_path: Path) -> None:
    """Two steps of one process, two of three processes; then the last step once more, by one process.

    Four streams can't be cut in three, so weights are cut along another dimension here.
    """
    recipe = replace(RECIPE, watch=replace(RECIPE.watch, save_every=1, keep=4))
    run = tmp_path / "run"
    train_until(recipe, run, 2)
    train_in_processes(recipe, run, 3)
    assert_same(alone, run)
    shutil.rmtree(run / "state" / "step_00000004")
    train(recipe, run)
    assert_same(alone, run)


@pytest.mark.slow
def test_adapters_are_trained_by_two_processes(debug_checkpoint: Path, tmp_path: Path) -> None:
    """Frozen weights are bfloat16, adapters float32: both are cut over the processes."""
    recipe = replace(RECIPE, compute=Compute(precision="bf16"), start=FineTuning(str(debug_checkpoint), 3))
    train(recipe, tmp_path / "one")
    train_in_processes(recipe, tmp_path / "two", 2)
    assert torch.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-3, atol=1e-3)
    pipe = u4d.Pipeline.from_pretrained(debug_checkpoint)
    pipe.load_lora(tmp_path / "two" / "adapter")


@pytest.mark.slow
def test_what_all_processes_refuse_is_told_once(tmp_path: Path) -> None:
    """torchrun ends the others as soon as the main process has told it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "u4d.cli"]
    command += ["train", "debug", "-o", str(tmp_path / "run"), "--device", "cpu", "--workers", "0", "--set", "batch=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode != 0
    assert done.stderr.count("u4d: error: batch: expected a multiple of the number of processes (2), got 3") == 1


@pytest.mark.parametrize(
    ("shape", "processes", "dimension"),
    [((4, 96, 48), 2, 0), ((4, 96, 48), 4, 0), ((4, 96, 480), 8, 2), ((4, 1, 6, 64), 16, 3), ((4, 10), 8, 0)],
)
def test_weights_are_cut_where_all_processes_get_a_part(shape: tuple[int, ...], processes: int, dimension: int) -> None:
    assert shard_dimension(nn.Parameter(torch.zeros(shape)), processes) == Shard(dimension)
