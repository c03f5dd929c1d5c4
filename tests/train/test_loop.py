"""The training loop: it learns, it resumes bit for bit, and it stops at the first NaN."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import u4d
import u4d.train.loop as loop
from u4d.errors import UserError
from u4d.train.clips import Schedule
from u4d.train.loop import require_finite, train
from u4d.train.recipe import Phase, Recipe, debug_run


def losses(run: Path) -> list[list[float]]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; beside it, in `halfway`, its folder as it was after the first save."""
    run = tmp_path_factory.mktemp("whole") / "run"
    real = loop.save

    def save_and_keep_the_first(out: Path, step: int, *parts: object) -> None:
        real(out, step, *parts)
        if step == debug_run().save_every:
            shutil.copytree(out, out.with_name("halfway"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save_and_keep_the_first)
        train(debug_run(), run, workers=0, progress=False)
    return run


def test_a_run_leaves_a_checkpoint_that_completes_scenes(finished: Path) -> None:
    pipe = u4d.Pipeline.from_pretrained(finished / "checkpoint")
    out = pipe.complete(u4d.Scene(rgb=torch.rand(6, 3, 32, 48)), steps=1)
    assert bool(torch.isfinite(out.depth).all())


def test_a_resumed_run_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    """Start again from the first save: weights and average are those of the run never stopped, bit for bit."""
    run = tmp_path / "run"
    shutil.copytree(finished.with_name("halfway"), run)
    train(debug_run(), run, workers=0, progress=False)
    whole, resumed = (torch.load(folder / "state.pt", weights_only=True) for folder in (finished, run))
    assert whole["step"] == resumed["step"] == debug_run().steps
    for part in ("model", "average"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), name
    assert losses(finished) == losses(run)


def test_a_folder_of_another_recipe_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="another recipe"):
        train(replace(debug_run(), seed=1), finished, workers=0, progress=False)


def test_training_reduces_the_loss(tmp_path: Path) -> None:
    """Sixty steps on eight clips: the geometry losses fall clearly below where they start."""
    recipe = debug_run()
    phase = Phase(steps=60, patterns={"geometry_dense": 1.0}, frames={6: 1.0}, target_floor=0.5)
    recipe = replace(
        recipe,
        phases=(phase,),
        window=8,
        draws=60,
        batch=8,
        save_every=60,
        optim=replace(recipe.optim, lr=1e-2, warmup=5),
    )
    train(recipe, tmp_path / "run", workers=0, progress=False)
    geometry = torch.tensor(losses(tmp_path / "run"))[:, 1:].mean(-1)
    assert float(geometry[-10:].mean()) < 0.8 * float(geometry[:5].mean())


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_loss_that_is_not_finite_stops_the_run(loss: float, norm: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 7"):
        require_finite(torch.tensor(loss), torch.tensor(norm), 7, tmp_path)


def test_every_clip_of_a_window_is_used_equally_often() -> None:
    schedule = Schedule(window=8, batch=4, draws=3, seed=0)
    seen = torch.cat([schedule.positions(step) for step in range(schedule.steps_per_window)])
    assert torch.equal(torch.bincount(seen), torch.full((8,), 3))
    later = torch.cat([schedule.positions(6 + step) for step in range(6)])
    assert not torch.equal(seen, later)


def test_phases_follow_each_other() -> None:
    first, second = (Phase(steps=n, patterns={"joint": 1.0}, frames={3: 1.0}) for n in (2, 3))
    recipe = replace(debug_run(), phases=(first, second))
    assert recipe.steps == 5
    assert [recipe.phase_at(step) is first for step in range(6)] == [True, True, False, False, False, False]
    assert isinstance(recipe, Recipe)


def test_a_damaged_state_is_named_and_left_alone(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.with_name("halfway"), run)
    whole = (run / "state.pt").read_bytes()
    (run / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"state\.pt: damaged"):
        train(debug_run(), run, workers=0, progress=False)
    assert (run / "state.pt").read_bytes() == whole[: len(whole) // 2]
