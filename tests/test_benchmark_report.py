"""The benchmarks' bookkeeping: what is saved is what the report shows, and the committed report is up to date."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("harness"), importlib.import_module("report")


def test_rows_give_median_deciles_and_rates(modules) -> None:
    harness, _ = modules
    times = [float(value) for value in range(1, 22)]  # median 11 ms
    row = harness.row("case", "kernel", times, moved_bytes=11_000_000, copy_rate=2e9, peak_mb=3.0)
    assert (row.ms, row.gb_per_s, row.limit_share) == (11.0, 1.0, 0.5)
    assert 1 <= row.low_ms < 5 and 17 < row.high_ms <= 21 and row.notes == {"peak_mb": 3.0}


def test_versions_take_turns_and_warm_up_is_not_counted(modules) -> None:
    harness, _ = modules
    calls: list[str] = []
    times = harness.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", 3, warmup=2)
    assert calls == ["a", "b"] * 5 and [len(values) for values in times.values()] == [3, 3]


def test_versions_that_disagree_are_not_measured(modules) -> None:
    import torch

    harness, _ = modules
    harness.check_close((torch.ones(2),), (torch.ones(2),), 1e-6, "same")
    for wrong in (torch.tensor([1.0, 1.1]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(SystemExit, match="other: output 0 is off by"):
            harness.check_close((torch.ones(2),), (wrong,), 1e-6, "other")


def test_the_report_holds_what_was_saved(modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, report = modules
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "HERE", tmp_path)
    rows = [
        harness.row("1 x 50", "cpu kernel", [2.0, 2.0]),
        harness.row("1 x 50", "torch eager", [7.0, 7.0], errors=0.25),
    ]
    path = harness.save("some_op", rows, "cpu", threads=2)
    assert path.parent.parent == tmp_path / "results"
    text = report.report()
    assert "### some_op" in text and harness.machine_name("cpu") in text
    assert "| 1 x 50 | torch eager | 7.000 | 7.000 .. 7.000 | 3.5 |  |  | errors 0.25 |" in text


def test_the_committed_report_is_up_to_date(modules) -> None:
    _, report = modules
    if not any((BENCHMARKS / "results").glob("*/*.json")):
        assert not report.TARGET.exists()
        return
    assert report.TARGET.read_text() == report.report(), "run python benchmarks/report.py"
