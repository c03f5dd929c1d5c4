"""`u4d train`: what is asked of it, and that mistakes are told before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process import Command, tree

from u4d.train.recipe import FineTuning, Recipe, Source


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that would have been trained."""
    recipes: list[Recipe] = []

    def note(recipe: Recipe, out: Path, **options: object) -> Path:
        recipes.append(recipe)
        return out / ("checkpoint" if recipe.start is None or recipe.start.lora_rank is None else "adapter")

    monkeypatch.setattr("u4d.train.loop.train", note)
    return recipes


def test_settings_from_the_command_line(u4d: Command, trained: list[Recipe], tmp_path: Path) -> None:
    settings = ("optim.lr=3e-4", "batch=4", "data.sources.0.kind=scenes", "data.sources.0.path=clips")
    done = u4d("train", "debug", "-o", tmp_path / "run", "--set", *settings, "--set", "seed=7")
    (recipe,) = trained
    assert (recipe.optim.lr, recipe.batch, recipe.seed) == (3e-4, 4, 7)
    assert recipe.data.sources == (Source("scenes", path="clips"),)
    assert done.code == 0 and f"u4d eval --checkpoint {tmp_path / 'run' / 'checkpoint'}" in done.out


def test_where_a_run_begins(u4d: Command, trained: list[Recipe], tmp_path: Path) -> None:
    run = ("-o", tmp_path / "run")
    adapters = u4d("train", "debug", *run, "--from", "mine", "--lora", 4)
    assert f"--checkpoint mine --lora {tmp_path / 'run' / 'adapter'}" in adapters.out
    u4d("train", "debug", *run, "--from", "mine", "--set", "start.lora_rank=2")
    u4d("train", "wan_1_3b_mixture", *run, "--lora", 8)  # that recipe has a start of its own
    u4d("train", "wan_1_3b_mixture", *run, "--lora", 8, "--from", "mine")
    starts = [recipe.start for recipe in trained]
    assert starts == [FineTuning("mine", 4), FineTuning("mine", 2), FineTuning("wan4", 8), FineTuning("mine", 8)]


def test_only_the_main_process_prints(
    u4d: Command, trained: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert bool(u4d("train", "debug", "-o", tmp_path / "run").out) == prints
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("RECIPE: expected one of tiny_procedural, wan_1_3b_mixture, debug, got nothing",)),
        (("-o", "run"), ("RECIPE", "got nothing")),
        (("huge", "-o", "run"), ("RECIPE", "got 'huge'")),
        (("debug",), ("-o: expected a folder to write the run to",)),
        (("debug", "-o", "run", "--set", "optim.lrr=1"), ("optim.lrr", "nearest is optim.lr, which is 0.001 now")),
        (("debug", "-o", "run", "--set", "batch=many"), ("batch: expected a whole number, got 'many'",)),
        (("debug", "-o", "run", "--set"), ("--set",)),
        (("debug", "-o", "run", "--lora", "4"), ("--lora", "--from")),
        (("debug", "-o", "run", "--gpus", "4"), ("--gpus: expected --plan with it",)),
        (("debug", "-o", "run", "--raw"), ("--raw: expected --export with it",)),
        (("--plot", "run", "--step", "3"), ("--step: expected --export with it",)),
        (("--plot", "run"), ("run: --plot: no such file or folder",)),
        (("debug", "--plot", "run"), ("RECIPE: --plot takes a run as it is",)),
        (("--plot", "run", "--export", "run"), ("not allowed with",)),
        (("debug", "--plan", "--plot", "run"), ("not allowed with",)),
        (("--plan",), ("RECIPE", "got nothing")),
        (("debug", "--plan", "--gpus", "3"), ("gpus: expected a divisor of the batch of 2 clips, got 3",)),
        (("--export", "run"), ("-o: expected a folder to write the checkpoint to",)),
        (("--export", "run", "-o", "out"), ("run: --export: no such file or folder",)),
        (("--export", "run", "-o", "out", "--set", "batch=3"), ("--set: --export takes a run as it is",)),
        (("--export", "run", "-o", "out", "--lora", "3"), ("--lora: --export takes a run as it is",)),
    ],
)
def test_mistakes_are_told_before_the_work(
    arguments: tuple[str, ...],
    words: tuple[str, ...],
    u4d: Command,
    trained: list[Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = u4d("train", *arguments)
    (line,) = outcome.err.splitlines()
    assert outcome.code == 2 and all(word in line for word in words), line
    assert not trained and not tree(tmp_path)


def test_a_plan_is_printed_and_nothing_is_written(
    u4d: Command, trained: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = u4d("train", "debug", "-o", "run", "--set", "compute.activations=none", "--plan", "--gpus", 2)
    assert done.code == 0 and "GPUs: 2" in done.out and "(`none`, the recipe)" in done.out
    assert not trained and not tree(tmp_path)


def test_plotting_and_exporting_take_what_was_given(
    u4d: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def plot(run: Path, out: Path | None = None) -> Path:
        calls.append(("plot", run, out))
        return run / "curves.png"

    def export(run: Path, out: Path, *, average: bool = True, step: int | None = None) -> Path:
        calls.append(("export", run, out, average, step))
        return out

    monkeypatch.setattr("u4d.train.watch.plot.plot_run", plot)
    monkeypatch.setattr("u4d.train.state.consolidate.consolidate", export)
    (tmp_path / "run").mkdir()
    run, out = tmp_path / "run", tmp_path / "out"
    assert f"curves: {run / 'curves.png'}" in u4d("train", "--plot", run).out
    u4d("train", "--plot", run, "-o", out)
    assert f"written: {out}" in u4d("train", "--export", run, "-o", out).out
    u4d("train", "--export", run, "-o", out, "--raw", "--step", 4)
    assert calls == [
        ("plot", run, None),
        ("plot", run, out),
        ("export", run, out, True, None),
        ("export", run, out, False, 4),
    ]


def test_help_names_recipes_and_examples(u4d: Command) -> None:
    text = u4d("train", "--help").out
    for words in ("tiny_procedural", "wan_1_3b_mixture", "torchrun --nproc-per-node 4", "--set", "state/"):
        assert words in text
