"""From saved states, in however many parts, to what a run itself writes at its end: byte for byte the same."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import u4d
from train.runs import saved, train, train_in_processes
from u4d.errors import UserError
from u4d.train.recipe import FineTuning, Recipe, debug_run
from u4d.train.state.consolidate import consolidate

TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"


def adapters(checkpoint: Path) -> Recipe:
    return replace(debug_run(), start=FineTuning(str(checkpoint), 2))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(debug_run(), run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_average_is_the_runs_own_checkpoint(finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    assert consolidate(finished, tmp_path / "out") == tmp_path / "out"
    assert contents(tmp_path / "out") == contents(finished / "checkpoint")
    assert contents(finished) == before
    out = u4d.Pipeline.from_pretrained(tmp_path / "out").complete(u4d.Scene(rgb=torch.rand(6, 3, 32, 48)), steps=1)
    assert bool(torch.isfinite(out.depth).all())


def test_the_weights_themselves_and_older_steps_can_be_had(finished: Path, tmp_path: Path) -> None:
    consolidate(finished, tmp_path / "out", average=False)
    found, state = load_file(tmp_path / "out" / TRANSFORMER), saved(finished)
    assert found.keys() == state["model"].keys()
    assert all(torch.equal(tensor, state["model"][name].bfloat16()) for name, tensor in found.items())
    consolidate(finished, tmp_path / "out", step=2)  # an older checkpoint there is replaced
    older = load_file(tmp_path / "out" / TRANSFORMER)
    assert not torch.equal(older["proj_out.weight"], state["average"]["proj_out.weight"].bfloat16())


def test_a_stopped_run_needs_no_checkpoint(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint").rename(tmp_path / "checkpoint")
    consolidate(run, tmp_path / "out")
    for part in ("transformer", "vae"):
        name = Path(part) / "diffusion_pytorch_model.safetensors"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes()


def test_a_damaged_state_is_told_and_the_one_before_is_used(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    consolidate(run, tmp_path / "older", step=2)
    (run / "state" / "step_00000004" / "__0_0.distcp").write_bytes(b"")
    consolidate(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "older")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and "step_00000004/__0_0.distcp: expected" in told[0]
    with pytest.raises(UserError, match=r"no whole state: .*step_00000004/__0_0\.distcp: expected \d+ bytes, got 0"):
        consolidate(run, tmp_path / "none", step=4)
    assert not (tmp_path / "none").exists()


def test_what_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"expected step_00000003, there are: step_00000002, step_00000004"):
        consolidate(run, out, step=3)
    with pytest.raises(UserError, match=r"expected the folder of a run, with recipe\.json"):
        consolidate(tmp_path, out)
    shutil.rmtree(run / "codec")
    with pytest.raises(UserError, match=r"codec: expected the run's codec, found none"):
        consolidate(run, out)
    shutil.rmtree(run / "state")
    with pytest.raises(UserError, match=r"state: expected a saved state, there are: none"):
        consolidate(run, out)
    assert not out.exists()


def test_other_files_are_never_replaced(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        consolidate(finished, tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_run_of_adapters_gives_its_adapter(debug_checkpoint: Path, tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    shutil.copytree(debug_checkpoint, checkpoint)
    train(adapters(checkpoint), run)
    consolidate(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(run / "adapter")
    tensors = load_file(checkpoint / TRANSFORMER)
    tensors["proj_out.weight"][0, 0, 0] += 1
    save_file(tensors, checkpoint / TRANSFORMER, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds other weights now; bring the old ones back"):
        consolidate(run, tmp_path / "out")


@pytest.mark.slow
def test_states_in_parts_become_whole(debug_checkpoint: Path, tmp_path: Path) -> None:
    """What two processes have saved, each its parts, is what they have gathered in the end."""
    for name, recipe in (("checkpoint", debug_run()), ("adapter", adapters(debug_checkpoint))):
        run = tmp_path / name
        train_in_processes(recipe, run, 2)
        assert len(list((run / "state" / "step_00000004").glob("*.distcp"))) == 2
        assert contents(consolidate(run, tmp_path / "out" / name)) == contents(run / name)
