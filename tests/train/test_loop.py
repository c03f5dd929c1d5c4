"""The training loop: it learns, it resumes bit for bit, and it stops at the first NaN."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import u4d
import u4d.train.loop as loop
from train.runs import losses, same_bits, saved, train, train_until
from u4d.errors import UserError
from u4d.model.transformer import Transformer
from u4d.train.data.samples import Samples
from u4d.train.loop import make_optimizer
from u4d.train.recipe import Compute, Data, Phase, Recipe, Watching, debug_run
from u4d.train.world import World


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; beside it, in `halfway`, one that was stopped after its first save."""
    folder = tmp_path_factory.mktemp("runs")
    train_until(debug_run(), folder / "halfway", 3)
    train(debug_run(), folder / "run")
    return folder / "run"


def test_a_run_leaves_a_checkpoint_that_completes_scenes(finished: Path) -> None:
    pipe = u4d.Pipeline.from_pretrained(finished / "checkpoint")
    out = pipe.complete(u4d.Scene(rgb=torch.rand(6, 3, 32, 48)), steps=1)
    assert bool(torch.isfinite(out.depth).all())
    average = saved(finished)["average"]
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, average[name].to(torch.bfloat16).float()), name


def test_a_resumed_run_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    """Start again from the first save: weights and average are those of the run never stopped, bit for bit."""
    run = tmp_path / "run"
    shutil.copytree(finished.with_name("halfway"), run)
    before = saved(run)
    assert len(losses(run)) == 3 and not (run / "checkpoint").exists()
    train(debug_run(), run)
    assert same_bits(saved(finished), saved(run)) and not same_bits(before, saved(run))
    assert torch.equal(losses(finished), losses(run))
    for file in ("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (run / "checkpoint" / file).read_bytes() == (finished / "checkpoint" / file).read_bytes()


def test_a_finished_run_only_writes_its_result_again(finished: Path, tmp_path: Path) -> None:
    """A run may have been killed between its last state and its result."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoint")
    assert train(debug_run(), run) == run / "checkpoint"
    assert torch.equal(losses(finished), losses(run)) and (run / "checkpoint" / "model_index.json").exists()


def test_a_folder_of_another_recipe_is_refused(finished: Path) -> None:
    before = (finished / "recipe.json").read_text()
    for other in (replace(debug_run(), seed=1), replace(debug_run(), batch=4)):
        with pytest.raises(UserError, match="another recipe"):
            train(other, finished)
    assert (finished / "recipe.json").read_text() == before


def test_a_run_may_go_on_with_other_settings_of_the_machine(finished: Path, tmp_path: Path) -> None:
    """How a step is computed, and how often it is saved; the losses are the same but for rounding."""
    run = tmp_path / "run"
    shutil.copytree(finished.with_name("halfway"), run)
    compute = Compute(micro_batch=1, activations="none")
    train(replace(debug_run(), compute=compute, watch=Watching(save_every=1, keep=3)), run)
    assert torch.allclose(losses(run), losses(finished), rtol=1e-2, atol=1e-2)
    assert len(list((run / "state").iterdir())) == 3


@pytest.mark.gpu
def test_a_gpu_trains_it_too(tmp_path: Path) -> None:
    """Noise is drawn on the GPU, and samples one step ahead."""
    runs = [tmp_path / "one", tmp_path / "again"]
    for run in runs:
        loop.train(debug_run(), run, workers=0, device="cuda", progress=False)
    assert bool(torch.isfinite(losses(runs[0])).all())
    assert torch.allclose(losses(runs[0]), losses(runs[1]), rtol=1e-2, atol=1e-2)


def test_training_reduces_the_loss(tmp_path: Path) -> None:
    """Sixty steps on eight clips: the geometry losses fall clearly below where they start."""
    recipe = debug_run()
    phase = Phase(steps=60, patterns={"geometry_dense": 1.0}, frames={6: 1.0}, target_floor=0.5)
    recipe = replace(
        recipe,
        phases=(phase,),
        data=Data(window=1, draws=60),
        batch=8,
        watch=Watching(save_every=60, validate_every=60, validation_clips=2),
        optim=replace(recipe.optim, lr=1e-2, warmup=5),
    )
    train(recipe, tmp_path / "run")
    geometry = losses(tmp_path / "run")[:, 1:].mean(-1)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(geometry) == 60 and len(lines) == 61  # and one of the validation
    assert float(geometry[-10:].mean()) < 0.8 * float(geometry[:5].mean())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step, the clips and the batch are there to be looked at; the weights are those of before, and can go on."""
    run, real = tmp_path / "run", loop.accumulate_gradients
    seen: list[Samples] = []

    def poisoned(model: Any, codec: Any, statistics: Any, samples: Samples, *others: Any) -> torch.Tensor:
        seen.append(samples)
        loss = real(model, codec, statistics, samples, *others)
        return loss if len(seen) < 4 else loss * torch.tensor([1, float("nan"), 1, 1])

    monkeypatch.setattr(loop, "accumulate_gradients", poisoned)
    with pytest.raises(UserError, match=r"step 3: .*nan.*places 0 to 1, clips \[.*bad_step_00000003\.pt"):
        train(debug_run(), run)
    bad = torch.load(run / "bad_step_00000003.pt", weights_only=True)
    assert bad["step"] == 3 and bad["places"] == [0, 1]
    assert torch.equal(bad["numbers"], seen[3].clips.numbers) and torch.equal(bad["noise"], seen[3].noise)
    assert torch.equal(bad["rgb"], seen[3].clips.clips.rgb) and torch.equal(bad["times"], seen[3].task.times)
    monkeypatch.undo()
    train(debug_run(), run)
    assert len(losses(run)) == 4


def test_only_matrices_decay() -> None:
    model = Transformer(debug_run().preset.transformer)
    decaying, others = (group["params"] for group in make_optimizer(model, debug_run().optim).param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decaying) + len(others) == len(names)
    assert all(names[id(parameter)].endswith("weight") for parameter in decaying)
    assert {"blocks.0.scale_shift_table", "blocks.0.norm2.weight", "scale_shift_table"} < {
        names[id(parameter)] for parameter in others
    }


def test_phases_follow_each_other() -> None:
    first, second = (Phase(steps=n, patterns={"joint": 1.0}, frames={3: 1.0}) for n in (2, 3))
    recipe = replace(debug_run(), phases=(first, second))
    assert recipe.steps == 5
    assert [recipe.phase_at(step) is first for step in range(6)] == [True, True, False, False, False, False]
    assert isinstance(recipe, Recipe)


def test_a_batch_that_can_not_be_shared_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "start_world", lambda device: nullcontext(World(torch.device(device), 0, 3)))
    with pytest.raises(UserError, match=r"batch: expected a multiple of the number of processes \(3\), got 2"):
        train(debug_run(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
