"""The end-to-end benchmark, with the smallest model: every case has its row, and what was not run says so."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from torch import Tensor

import u4d_fast
from u4d_fast.backend import default_backend

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OPTIONS = ("--preset", "debug", "--device", "cpu", "--threads", "1", "--rounds", "1", "--save")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    harness, bench = importlib.import_module("harness"), importlib.import_module("end_to_end")
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *OPTIONS, *options])
    bench.main()
    (path,) = folder.rglob("end_to_end.json")
    return json.loads(path.read_text())


def test_every_stage_step_clip_and_search_has_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, tmp_path, "--steps", "4", "--candidates", "5", "--no-compile")
    rows = {(row["case"], row["version"]): row for row in result["rows"]}
    for case in ("encode rgb", "encode rgb and depth", "decode depth", "decode rgb and depth", "cameras", "score"):
        assert rows[case, "u4d"]["ms"] > 0
    eager, plain = "u4d kernels, eager launches", "torch eager + SDPA"
    for version in (eager, plain):
        step, clip = rows["step, 1 clip x 2 branches", version], rows["one clip, 4 steps, all stages", version]
        assert step["notes"]["launched"] == "eager: switched off" and step["notes"]["tflop_per_s"] > 0
        assert clip["notes"]["steps"] == "all run"
        assert clip["ms"] == pytest.approx(clip["notes"]["denoise_ms"] + clip["notes"]["other_stages_ms"])
    assert rows["step, 1 clip x 2 branches", plain]["notes"]["error"] == 0
    assert 0 < rows["one clip, 4 steps, all stages", eager]["notes"]["error"] < 1e-4
    halving = rows["5 candidates, 5 -> 2 -> 1", eager]
    assert halving["notes"]["steps"] == "all run" and rows["5 candidates, every forward", eager]
    assert "step, 4 clips x 2 branches" in {case for case, _ in rows}


def test_what_does_not_fit_the_time_is_extrapolated_or_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, tmp_path, "--steps", "40", "--candidates", "16", "--minutes", "0")
    rows = {(row["case"], row["version"]): row for row in result["rows"]}
    eager = "u4d kernels, eager launches"
    step = rows["step, 1 clip x 2 branches", eager]["ms"]
    clip = rows["one clip, 40 steps, all stages", eager]
    assert clip["notes"]["steps"] == "extrapolated from single steps"
    assert clip["notes"]["denoise_ms"] == pytest.approx(40 * step)
    four = rows["step, 4 clips x 2 branches", eager]["ms"]
    full = rows["16 candidates, every forward", eager]["notes"]["denoise_ms"]
    assert full == pytest.approx(40 * 4 * four)
    halving = rows["16 candidates, 16 -> 4 -> 1", eager]["notes"]
    per_candidate = sum(rows[name, "u4d"]["ms"] for name in ("decode rgb and depth", "cameras", "score"))
    assert halving["denoise_ms"] == pytest.approx((5 * 4 + 10) * four + 25 * step + 20 * per_candidate)
    assert result["skipped"]["torch.compile, blocks"].endswith("s were left, too few to compile in")


def test_what_fails_or_is_wrong_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(model: object, *, precision: str) -> None:
        raise ValueError(f"no {precision} here\nand more")

    def score(*clips: Tensor) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(importlib.import_module("end_to_end"), "score_candidates", score)
    monkeypatch.setattr("u4d_fast.accelerate", refuse)
    right = u4d_fast.gated_residual

    def wrong(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        return right(x, update, gate) if default_backend() == "reference" else x

    monkeypatch.setattr("u4d_fast.gated_residual", wrong)
    result = run(monkeypatch, tmp_path, "--steps", "4", "--candidates", "5", "--no-compile")
    assert result["skipped"]["u4d kernels, fp8"] == "no fp8 here"
    assert result["skipped"]["u4d kernels, eager launches"].startswith("one forward is off by")
    assert {row["version"] for row in result["rows"]} == {"u4d", "torch eager + SDPA"}
    assert result["skipped"]["score"] == "no kernel"
    assert result["skipped"]["clip, torch eager + SDPA"] == "the stage 'score' was not measured"
