"""`make gpu-check`: what it runs, that a failure stops nothing, and that time limits hold. No GPU is needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_WHEELS = Path("nowhere")


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("gpu_check")


def python(gpu_check, name: str, code: str, limit: float = 60.0, **settings: object):
    return gpu_check.Step(name, (sys.executable, "-c", code), limit, **settings)


def test_every_benchmark_belongs_to_one_part(gpu_check) -> None:
    for device in ("cuda", "cpu"):
        steps = [step for part in ("bench", "peers", "end-to-end") for step in gpu_check.PARTS[part](device, NO_WHEELS)]
        commands = [Path(step.command[1]).name for step in steps]
        assert len(commands) == len(set(commands))
        assert {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")} <= set(commands)
        assert all(("--save" in step.command) == (device == "cuda") for step in steps)


def test_limits_leave_room_within_nine_minutes(gpu_check) -> None:
    assert sum(step.limit for step in gpu_check.PARTS["peers"]("cuda", NO_WHEELS)) <= 300
    assert gpu_check.REPORT_SECONDS < 530 <= 540


def test_the_package_is_built_with_cuda_and_carried_wheels_come_first(gpu_check, tmp_path: Path) -> None:
    (tmp_path / "one-1.0-py3-none-any.whl").touch()
    names = [step.name for step in gpu_check.PARTS["build"]("cuda", tmp_path)]
    assert names == ["device", "carried wheels", "package", "info"]
    *_, package, _ = gpu_check.PARTS["build"]("cuda", NO_WHEELS)
    assert package.environment == {"U4D_CUDA": "1"} and "--no-build-isolation" in package.command


def test_what_needs_more_than_torch_is_left_out_with_the_reason(gpu_check, monkeypatch, capfd) -> None:
    monkeypatch.setattr(gpu_check, "PACKAGE_NEEDS", ("a_package_of_tomorrow",))
    assert gpu_check.run_parts(["end-to-end"], "cpu", NO_WHEELS, 60) == []
    assert "bench_training left out: a_package_of_tomorrow is not installed" in capfd.readouterr().out


def test_a_failure_stops_nothing_and_is_named_at_the_end(gpu_check, monkeypatch, capfd) -> None:
    steps = [python(gpu_check, "bad", "raise SystemExit(3)"), python(gpu_check, "good", "print('ran')")]
    monkeypatch.setitem(gpu_check.PARTS, "build", lambda *_: steps)
    monkeypatch.setitem(gpu_check.PARTS, "report", lambda *_: [python(gpu_check, "last", "print('ran, too')")])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "build", "report", "--device", "cpu"])
    monkeypatch.delenv("OUT", raising=False)
    assert gpu_check.main() == 1
    out = capfd.readouterr().out
    assert "\nran\n" in out and "ran, too" in out and "=== build took" in out
    assert out.splitlines()[-2:][0].startswith("gpu-check: 1 steps failed")
    assert out.splitlines()[-1] == "  build: bad: exit code 3"


def test_a_step_that_hangs_is_stopped_with_what_it_started(gpu_check, tmp_path: Path) -> None:
    mark = tmp_path / "survived"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    begin = time.monotonic()
    assert gpu_check.run_step(python(gpu_check, "slow", code, limit=1.0), 60.0) == "stopped after 1 s"
    assert time.monotonic() - begin < 20
    time.sleep(2.5)
    assert not mark.exists()


def test_no_step_starts_when_time_is_over_but_the_report(gpu_check, monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(gpu_check, "run_step", lambda step, seconds: ran.append((step.name, seconds)) or "")
    gpu_check.run_parts(["peers", "report"], "cpu", NO_WHEELS, gpu_check.REPORT_SECONDS)
    assert [seconds for _, seconds in ran[:-1]] == [0.0] * 3
    assert ran[-1][0] == "RESULTS.md" and ran[-1][1] > gpu_check.REPORT_SECONDS - 5
    monkeypatch.undo()
    assert gpu_check.run_step(python(gpu_check, "late", "pass"), 0.0) == "no time was left for it"


def test_results_are_packed_for_the_way_back(gpu_check, tmp_path: Path) -> None:
    with tarfile.open(gpu_check.pack(tmp_path)) as archive:
        names = archive.getnames()
    assert "benchmarks/RESULTS.md" in names and any(name.endswith("warp_frames.json") for name in names)


def test_an_unknown_part_is_refused(gpu_check, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "sing"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "got 'sing'" in capsys.readouterr().err


def test_make_calls_it_for_all_parts_and_for_each(gpu_check) -> None:
    targets = ["gpu-check", *(f"gpu-{part}" for part in gpu_check.PARTS)]
    shown = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in shown.splitlines() if "gpu_check.py" in line]
    assert [line.split("gpu_check.py ")[1].split(" --device cuda")[0] for line in lines][1:] == list(gpu_check.PARTS)


@pytest.mark.slow
def test_a_rehearsal_without_a_gpu(tmp_path: Path) -> None:
    """Tests, ceilings and report as on a GPU, with small shapes; building would replace the module in use."""
    for part in ("gpu-test", "gpu-peers", "gpu-report"):
        command = ["make", part, f"GPU_PYTHON={sys.executable}", "GPU_DEVICE=cpu", f"GPU_WHEELS={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "gpu-check: every step passed" in done.stdout
