"""Everything that a machine with a GPU is rented for, in parts, within a time limit.

    python benchmarks/gpu_check.py [PART ...] [--device cuda|cpu] [--limit 530] [--wheels .wheels]

Parts: build, test, bench, end-to-end, peers, report; all of them without a PART. `make gpu-check` and `make gpu-PART`
call this. A step that fails, or has no time left, does not stop the others; the exit code is then 1 and the last lines
name it. Each step has a limit of its own. If the environment variable OUT names a folder, all results are packed there
as results.tar.gz. `--device cpu` is a rehearsal with small shapes that saves nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
PEERS = ("copy", "gemm", "attention")  # ceilings: what torch and other libraries reach
SYSTEM = ("accelerate", "training")  # run with the whole package
PACKAGE_NEEDS = ("diffusers",)  # of the whole package, besides what a bare GPU machine has
REPORT_SECONDS = 20.0  # kept free for the last part


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: what the summary calls it.
        command: program and arguments.
        limit: seconds after which it is killed; it counts as failed then.
        environment: variables besides our own.
        left_out: why it is not run, which is no failure; the empty string where it is.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    left_out: str = ""


def build_steps(device: str, wheels: Path) -> list[Step]:
    """Carried wheels, then the package with its kernels, in place."""
    python = sys.executable
    found = "import torch; assert torch.cuda.is_available(), 'torch sees no CUDA device'; "
    look = f"{found if device == 'cuda' else 'import torch; '}print(torch.__version__)"
    pip = (python, "-m", "pip", "install", "-q", "--no-deps")
    steps = [Step("device", (python, "-c", look), 60)]
    carried = sorted(str(path) for path in wheels.glob("*.whl"))
    if carried:
        steps.append(Step("carried wheels", (*pip, "--no-index", *carried), 60))
    environment = {"U4D_CUDA": "1" if device == "cuda" else "0"}
    steps.append(Step("package", (*pip, "--no-build-isolation", "-e", str(ROOT)), 240, environment))
    steps.append(Step("info", (python, "-c", "import u4d_fast; print(u4d_fast.info())"), 60))
    return steps


def test_steps(device: str, wheels: Path) -> list[Step]:
    """The GPU tests: those of the kernels, and other files that have some where the whole package can be imported."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu")
    others = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "kernels" not in path.parts]
    marked = [str(path.relative_to(ROOT)) for path in others if "mark.gpu" in path.read_text()]
    reason = lacking_reason(wheels) if marked else "none has any"
    return [
        Step("GPU tests of the kernels", (*pytest, "tests/kernels"), 180),
        Step("GPU tests of the package", (*pytest, *marked), 90, left_out=reason),
    ]


def bench_steps(device: str, wheels: Path) -> list[Step]:
    """Every op's benchmark."""
    others = {f"bench_{name}.py" for name in (*PEERS, *SYSTEM)}
    files = sorted(path for path in HERE.glob("bench_*.py") if path.name not in others)
    return [benchmark(path, device, "--seconds", "8", limit=45) for path in files]


def peers_steps(device: str, wheels: Path) -> list[Step]:
    """The ceilings."""
    small = device != "cuda"
    short, long = ("0.05", "0.05") if small else ("0.4", "2")
    preset = ("--preset", "debug") if small else ()
    return [
        benchmark(HERE / "bench_copy.py", device, "--sustain", short, limit=40),
        benchmark(HERE / "bench_gemm.py", device, "--sustain", short, "--seconds", "25", *preset, limit=60),
        benchmark(HERE / "bench_attention.py", device, "--sustain", long, "--seconds", "130", *preset, limit=180),
    ]


def end_to_end_steps(device: str, wheels: Path) -> list[Step]:
    """The whole system, and what else needs the whole package."""
    files = [HERE / "end_to_end.py", *(HERE / f"bench_{name}.py" for name in SYSTEM)]
    return [benchmark(path, device, limit=180, left_out=lacking_reason(wheels)) for path in files]


def report_steps(device: str, wheels: Path) -> list[Step]:
    """RESULTS.md; a rehearsal only looks whether it is up to date."""
    check = () if device == "cuda" else ("--check",)
    return [Step("RESULTS.md", (sys.executable, str(HERE / "report.py"), *check), REPORT_SECONDS)]


PARTS: dict[str, Callable[[str, Path], list[Step]]] = {
    "build": build_steps,
    "test": test_steps,
    "bench": bench_steps,
    "end-to-end": end_to_end_steps,
    "peers": peers_steps,
    "report": report_steps,
}


def benchmark(path: Path, device: str, *options: str, limit: float, left_out: str = "") -> Step:
    """A benchmark's step; left out if there is no such file."""
    reason = left_out if path.exists() else "there is no such file"
    save = ("--save",) if device == "cuda" else ()
    return Step(path.stem, (sys.executable, str(path), "--device", device, *save, *options), limit, left_out=reason)


def lacking_reason(wheels: Path) -> str:
    """Why the whole package can't be imported; the empty string where it can."""
    missing = [name for name in PACKAGE_NEEDS if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed: put the wheel into {wheels} and build again" if missing else ""


def run_step(step: Step, seconds: float) -> str:
    """Run a step; returns why it failed, or the empty string.

    Args:
        seconds: what is left of the whole time.
    """
    limit = min(step.limit, seconds)
    if limit < 1:
        return "no time was left for it"
    python_path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **step.environment}
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the compilers and workers that it started, too
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"stopped after {limit:.0f} s"
        raise
    return f"exit code {code}" if code else ""


def run_parts(parts: list[str], device: str, wheels: Path, limit: float) -> list[str]:
    """Run the parts' steps in order; returns a line for each that failed."""
    begin, failed = time.monotonic(), []
    for part in parts:
        part_begin = time.monotonic()
        print(f"=== {part}", flush=True)
        importlib.invalidate_caches()  # an earlier part may have installed something
        for step in PARTS[part](device, wheels):
            if step.left_out:
                print(f"--- {step.name} left out: {step.left_out}", flush=True)
                continue
            step_begin = time.monotonic()
            kept = 0.0 if part == "report" else REPORT_SECONDS
            reason = run_step(step, max(0.0, limit - kept - (step_begin - begin)))
            if reason:
                failed.append(f"{part}: {step.name}: {reason}")
            print(f"--- {step.name}: {reason or 'done'}, {time.monotonic() - step_begin:.0f} s", flush=True)
        print(f"=== {part} took {time.monotonic() - part_begin:.0f} s", flush=True)
    return failed


def pack(folder: Path) -> Path:
    """All results as one file, since only few files come back from a rented machine."""
    target = folder / "results.tar.gz"
    with tarfile.open(target, "w:gz") as archive:
        for path in (HERE / "results", HERE / "RESULTS.md"):
            if path.exists():
                archive.add(path, path.relative_to(ROOT))
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all without one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds that all parts together may take")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels", help="a folder of wheels to install first")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART: expected one of {', '.join(PARTS)}, got {unknown[0]!r}")
    begin = time.monotonic()
    failed = run_parts(options.parts or list(PARTS), options.device, options.wheels, options.limit)
    if os.environ.get("OUT"):
        print(f"packed: {pack(Path(os.environ['OUT']))}")
    print(f"gpu-check: {len(failed)} steps failed" if failed else "gpu-check: every step passed", end="")
    print(f", {time.monotonic() - begin:.0f} s", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
