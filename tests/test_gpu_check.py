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
    module = importlib.import_module("gpu_check")
    module.gpu_steps.hear_interrupts()
    return module


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
    assert sum(gpu_check.KEPT_SECONDS.values()) < 240 and gpu_check.KEPT_SECONDS.keys() <= gpu_check.PARTS.keys()


def test_the_package_is_built_with_cuda_and_carried_wheels_come_first(gpu_check, tmp_path: Path) -> None:
    (tmp_path / "one-1.0-py3-none-any.whl").touch()
    names = [step.name for step in gpu_check.PARTS["build"]("cuda", tmp_path)]
    assert names == ["device", "carried wheels", "kernels", "info"]
    device, kernels, _ = gpu_check.PARTS["build"]("cuda", NO_WHEELS)
    assert kernels.environment["U4D_CUDA"] == "1" and kernels.command[1:] == (
        "setup.py",
        "-q",
        "build_ext",
        "--inplace",
    )
    assert device.vital and kernels.vital


def test_every_gpu_test_runs_in_a_process_of_its_file(gpu_check) -> None:
    kernels, others = gpu_check.gpu_test_files()
    names = {path.stem for path in kernels}
    assert {"test_multi_stream_attention_cuda", "test_rays_to_cameras", "test_gated_residual"} <= names
    assert "test_machine_code" not in names and {path.stem for path in others} >= {"test_captured", "test_loop"}
    steps = gpu_check.PARTS["test"]("cuda", NO_WHEELS)
    assert [step.command[-1] for step in steps] == [str(path.relative_to(ROOT)) for path in (*kernels, *others)]


def test_nothing_runs_without_what_is_vital(gpu_check, monkeypatch, capfd, tmp_path: Path) -> None:
    steps = [python(gpu_check, "heart", "raise SystemExit(1)", vital=True), python(gpu_check, "hand", "print('ran')")]
    for name in ("build", "report"):
        monkeypatch.setitem(gpu_check.PARTS, name, lambda *_: steps)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.run_parts(["build", "report"], "cpu", NO_WHEELS, 60) == ["build: heart: exit code 1"]
    out = capfd.readouterr().out
    assert "ran" not in out and "nothing else makes sense after that" in out and (tmp_path / "results.tar.gz").exists()


def test_tests_run_beside_each_other_and_leave_logs(gpu_check, monkeypatch, capfd, tmp_path: Path) -> None:
    meet = f"""
import pathlib, sys, time
here, there = (pathlib.Path({str(tmp_path)!r}) / name for name in sys.argv[1:])
here.touch()
while not there.exists(): time.sleep(0.01)
"""
    steps = [
        gpu_check.Step("One / a", (sys.executable, "-c", meet, "one", "two"), 20),
        gpu_check.Step("Two", (sys.executable, "-c", meet + "print('lost'); raise SystemExit(5)", "two", "one"), 20),
        python(gpu_check, "Three", "raise SystemExit(5)", fine=(0, 5)),
    ]
    monkeypatch.setattr(gpu_check.gpu_steps, "LOGS", tmp_path / "logs")
    monkeypatch.setitem(gpu_check.PARTS, "test", lambda *_: steps)
    assert gpu_check.run_parts(["test"], "cpu", NO_WHEELS, 60) == ["test: Two: exit code 5"]
    assert "lost\n--- Two: exit code 5" in capfd.readouterr().out
    assert (tmp_path / "logs" / "two.log").read_text() == "lost\n" and (tmp_path / "logs" / "one-a.log").exists()


def test_a_step_is_asked_to_end_before_it_is_killed(gpu_check, capfd) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('3 tests have failed')"
    assert gpu_check.gpu_steps.run_step(python(gpu_check, "slow", code, limit=1.5), 60.0) == "stopped after 2 s"
    assert "3 tests have failed" in capfd.readouterr().out


def test_time_is_kept_for_later_parts(gpu_check, monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr(
        gpu_check.gpu_steps, "run_step", lambda step, seconds: seen.setdefault(step.name, seconds) and ""
    )
    gpu_check.run_parts(["build", "peers", "report"], "cpu", NO_WHEELS, 100.0)
    assert seen["device"] == pytest.approx(100 - 60 - 20, abs=2)
    assert seen["bench_copy"] == pytest.approx(100 - 20, abs=2) and seen["RESULTS.md"] == pytest.approx(100, abs=2)


def test_what_needs_more_than_torch_is_left_out_with_the_reason(gpu_check, monkeypatch, capfd) -> None:
    monkeypatch.setattr(gpu_check, "PACKAGE_NEEDS", ("a_package_of_tomorrow",))
    assert gpu_check.run_parts(["end-to-end"], "cpu", NO_WHEELS, 60) == []
    out = capfd.readouterr().out
    assert all(f"{name} left out: a_package_of_tomorrow" in out for name in ("end_to_end", "bench_training"))


def test_a_failure_stops_nothing_and_is_named_at_the_end(gpu_check, monkeypatch, capfd, tmp_path: Path) -> None:
    steps = [python(gpu_check, "bad", "raise SystemExit(3)"), python(gpu_check, "good", "print('ran')")]
    monkeypatch.setitem(gpu_check.PARTS, "build", lambda *_: steps)
    monkeypatch.setitem(gpu_check.PARTS, "report", lambda *_: [python(gpu_check, "last", "print('ran, too')")])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "build", "report", "--device", "cpu"])
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu_check.gpu_steps, "LOGS", tmp_path)
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
    assert gpu_check.gpu_steps.run_step(python(gpu_check, "slow", code, limit=1.0), 60.0) == "stopped after 1 s"
    assert time.monotonic() - begin < 20
    time.sleep(2.5)
    assert not mark.exists()


def test_no_step_starts_when_time_is_over_but_the_report(gpu_check, monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(gpu_check.gpu_steps, "run_step", lambda step, seconds: ran.append((step.name, seconds)) or "")
    gpu_check.run_parts(["peers", "report"], "cpu", NO_WHEELS, gpu_check.REPORT_SECONDS)
    assert [seconds for _, seconds in ran[:-1]] == [0.0] * 3
    assert ran[-1][0] == "RESULTS.md" and ran[-1][1] > gpu_check.REPORT_SECONDS - 5
    monkeypatch.undo()
    assert gpu_check.gpu_steps.run_step(python(gpu_check, "late", "pass"), 0.0) == "no time was left for it"


def test_results_are_packed_for_the_way_back(gpu_check, tmp_path: Path) -> None:
    with tarfile.open(gpu_check.pack(tmp_path / "new")) as archive:
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
