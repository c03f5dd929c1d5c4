"""The benchmark of a training step, with the smallest recipe: every policy's row, and what does not fit."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OPTIONS = ("--recipe", "debug", "--batch", "2", "--device", "cpu", "--threads", "1", "--rounds", "1", "--save")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("bench_training")


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict:
    monkeypatch.setattr(bench.harness, "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *OPTIONS, *options])
    bench.main()
    (path,) = folder.rglob("training.json")
    return json.loads(path.read_text())


def test_every_policy_has_a_row(bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(bench, monkeypatch, tmp_path, "--micro-batch", "1")
    first, *rows = result["rows"]
    assert first["version"] == "encoding the clips" and first["case"].startswith("debug x 2 in 1s, ")
    assert [row["version"] for row in rows] == ["kept: all", "kept: attention", "kept: none"]
    assert all(row["notes"]["clips_per_s"] == pytest.approx(2e3 / row["ms"]) for row in rows)
    assert "skipped" not in result


def test_fewer_layers_are_named(bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(bench, monkeypatch, tmp_path, "--layers", "1")
    assert all(row["case"].endswith("frames, 1 of 2 layers") for row in result["rows"])


def test_a_policy_that_does_not_fit_costs_the_others_nothing(
    bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = bench.Training.step

    def fails(training: object, policy: str) -> torch.Tensor:
        if policy == "all":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return step(training, policy) * (2 if policy == "attention" else 1)

    monkeypatch.setattr(bench.Training, "step", fails)
    result = run(bench, monkeypatch, tmp_path)
    assert [row["version"] for row in result["rows"]] == ["encoding the clips", "kept: none"]
    assert result["skipped"]["kept: all"] == "CUDA out of memory."
    assert "off by" in result["skipped"]["kept: attention"]


def test_weights_stay_as_they_are_while_steps_are_timed(bench) -> None:
    options = SimpleNamespace(batch=2, micro_batch=0, layers=None, device="cpu")
    training = bench.Training(bench.recipe_for("debug", options), bench.World(torch.device("cpu")))
    first, second = training.step("all"), training.step("none")
    assert torch.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize(("gigabytes", "layers"), [(150, 30), (85, 18)])
def test_as_many_layers_as_a_gpu_has_memory_for(
    bench, monkeypatch: pytest.MonkeyPatch, gigabytes: int, layers: int
) -> None:
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    assert bench.layers_that_fit(bench.RECIPES["wan_1_3b_mixture"](), "cuda") == layers


def test_a_gpu_without_memory_for_one_layer_is_told(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=16 * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    with pytest.raises(bench.UserError, match="memory for one layer"):
        bench.layers_that_fit(bench.RECIPES["wan_1_3b_mixture"](), "cuda")
