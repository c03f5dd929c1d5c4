"""Time limits of benchmarks, timing without a pause, and what the report says of versions that were skipped."""

from __future__ import annotations

import importlib
import math
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    module = importlib.import_module("harness")
    monkeypatch.setattr(module, "_deadline", math.inf)
    return module


@pytest.fixture
def sustained(harness):
    return importlib.import_module("sustained")


def test_without_a_limit_all_rounds_run(harness) -> None:
    assert len(harness.measure({"a": lambda: None}, "cpu", 50)["a"]) == 50


def test_a_limit_leaves_three_rounds_to_every_version(harness) -> None:
    harness.arguments("text").parse_args(["--seconds", "0"])
    times = harness.measure({"a": lambda: None, "b": lambda: None}, "cpu", 50)
    assert [len(values) for values in times.values()] == [harness.LEAST_ROUNDS] * 2


def test_a_measurement_takes_at_most_half_of_what_is_left(harness) -> None:
    harness.limit_time(100.0)
    assert 49 < harness.time_for_one() <= 50 and harness.time_for_one(2.0) == 2.0


def test_versions_that_fail_are_named_and_the_first_must_not(harness) -> None:
    def check(name: str, call: object) -> None:
        if name in wrong:
            raise SystemExit(f"{name} is off\nby much")

    versions = {name: (lambda: None) for name in ("ours", "theirs", "others")}
    wrong, skipped = {"theirs"}, {}
    assert list(harness.agreeing(versions, check, skipped)) == ["ours", "others"]
    assert skipped == {"theirs": "theirs is off"}
    wrong = {"ours"}
    with pytest.raises(SystemExit, match="ours is off"):
        harness.agreeing(versions, check, skipped)


def test_sustained_times_leave_the_warming_out(sustained) -> None:
    begin, calls = time.perf_counter(), []
    times, state = sustained.measure_sustained(lambda: calls.append(time.sleep(0.01)), "cpu", 0.4)
    assert time.perf_counter() - begin >= 0.4 and state == {}
    assert sustained.harness.LEAST_ROUNDS <= len(times) < len(calls) and min(times) >= 10


def test_sustained_times_keep_to_the_limit(sustained) -> None:
    sustained.harness.limit_time(0.0)
    begin = time.perf_counter()
    times, _ = sustained.measure_sustained(lambda: time.sleep(0.01), "cpu", 60.0)
    assert len(times) >= sustained.harness.LEAST_ROUNDS and time.perf_counter() - begin < 30


class FakeEvent:
    """A CUDA event on a machine without CUDA: the clock of the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = math.nan

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert not math.isnan(self.at)

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.at - self.at)


def test_a_gpu_is_kept_busy_and_asked_for_its_clock_halfway(sustained, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.clock_rate", lambda: asked.append(time.perf_counter()) or 1700)
    monkeypatch.setattr("torch.cuda.power_draw", lambda: 600_500)
    calls: list[None] = []
    begin = time.perf_counter()
    times, state = sustained.measure_sustained(lambda: calls.append(time.sleep(0.005)), "cuda", 0.5)
    assert state == {"sm_mhz": 1700.0, "watts": 600.5} and len(asked) == 1 and asked[0] - begin > 0.25
    assert min(times) >= 5 and len(calls) >= len(times) + sustained.QUEUED


def test_a_gpu_that_tells_nothing_is_timed_all_the_same(sustained, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr("torch.cuda.clock_rate", fail)
    assert sustained.gpu_state() == {}


def test_the_report_names_what_was_skipped(harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = importlib.import_module("report")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "HERE", tmp_path)
    harness.save("peers", [harness.row("a", "torch", [1.0, 1.0])], "cpu", 1, {"xformers": "not installed"})
    assert "Not measured: xformers (not installed)." in report.report()
