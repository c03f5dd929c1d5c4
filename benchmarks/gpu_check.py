"""Everything that a machine with a GPU is rented for, in parts, within a time limit.

    python benchmarks/gpu_check.py [PART ...] [--device cuda|cpu] [--limit 530] [--wheels .wheels]

Parts: build, test, bench, end-to-end, peers, report; all of them without a PART. `make gpu-check` and `make gpu-PART`
call this. A step that fails, or has no time left, does not stop the others (without a GPU or a build nothing else makes
sense, so then it does); the exit code is then 1 and the last lines name it. Each step has a limit of its own, and some
time is kept for later parts. If the environment variable OUT names a folder, results and logs are packed there as
results.tar.gz, anew after each part, so that a run that is cut off leaves what it has. `--device cpu` is a rehearsal
with small shapes that saves nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu_steps
from gpu_steps import ROOT, Step, run_steps

HERE = ROOT / "benchmarks"
PEERS = ("copy", "gemm", "attention")  # ceilings: what torch and other libraries reach
SYSTEM = ("accelerate", "training", "vae")  # run with the whole package
BENCH_FIRST = ("multi_stream_attention", "grouped_linear", "multi_stream_attention_fp8")  # what decides most
PACKAGE_NEEDS = ("diffusers",)  # of the whole package, besides what a bare GPU machine has
REPORT_SECONDS = 20.0
KEPT_SECONDS = {"end-to-end": 110.0, "peers": 60.0, "report": REPORT_SECONDS}  # for later parts, whatever comes before
TOGETHER = {"test": 4}  # steps at a time: tests of different files do not disturb each other, timings would
NO_TESTS = 5  # pytest's exit code where none of a file's tests is one for GPUs


def build_steps(device: str, wheels: Path) -> list[Step]:
    """Carried wheels, then the kernels, in place: PYTHONPATH does the rest, so that no environment is written to."""
    python = sys.executable
    found = "import torch; assert torch.cuda.is_available(), 'torch sees no CUDA device'; "
    look = f"{found if device == 'cuda' else 'import torch; '}print(torch.__version__)"
    steps = [Step("device", (python, "-c", look), 60, vital=True)]
    carried = sorted(str(path) for path in wheels.glob("*.whl"))
    if carried:
        pip = (python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
        steps.append(Step("carried wheels", (*pip, *carried), 60))
    environment = {"U4D_CUDA": "1" if device == "cuda" else "0", "U4D_REQUIRE_KERNELS": "1"}
    build = (python, "setup.py", "-q", "build_ext", "--inplace")
    steps.append(Step("kernels", build, 300, environment, vital=True))
    steps.append(Step("info", (python, "-c", INFO, device), 60))
    return steps


INFO = """
import sys, u4d_fast
info = u4d_fast.info()
print({name: value for name, value in info.items() if name != "ops"})
others = {op: where[sys.argv[1]] for op, where in info["ops"].items() if where[sys.argv[1]]["backend"] != sys.argv[1]}
print("not by a kernel:", others)
"""


def test_steps(device: str, wheels: Path) -> list[Step]:
    """The GPU tests, a process for each file: what one kernel breaks stays broken for its process alone.

    Those of the package are left out where it can't be imported. A rehearsal has nothing to break, and one process.
    """
    kernels, others = gpu_test_files()
    reason = lacking_reason(wheels)
    if device == "cpu":
        return [
            Step("GPU tests of the kernels", pytest(*kernels), 180),
            Step("GPU tests of the package", pytest(*others), 90, left_out=reason),
        ]
    wanted = [(path, "") for path in kernels] + [(path, reason) for path in others]
    return [
        Step(f"GPU tests: {path.stem}", pytest(path), 170, left_out=why, fine=(0, NO_TESTS)) for path, why in wanted
    ]


def gpu_test_files() -> tuple[list[Path], list[Path]]:
    """Test files of the kernels, and of the rest, that have GPU tests: marked so, or through what they import."""
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}
    marked = {path for path, text in texts.items() if "mark.gpu" in text}
    helpers = [path.stem for path in marked if not path.stem.startswith("test_")]
    importing = re.compile(rf"from (?:[a-z.]+\.)?(?:{'|'.join(helpers) or '$.'}) import")
    files = [
        path
        for path, text in texts.items()
        if path.stem.startswith("test_") and (path in marked or importing.search(text))
    ]
    return [path for path in files if "kernels" in path.parts], [path for path in files if "kernels" not in path.parts]


def pytest(*paths: Path) -> tuple[str, ...]:
    """The GPU tests of some files; a kernel that hangs is named by the stack after a minute."""
    options = ("-q", "-m", "gpu", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider")
    options += ("-o", "faulthandler_timeout=60")
    return (sys.executable, "-m", "pytest", *options, *(str(path.relative_to(ROOT)) for path in paths))


def bench_steps(device: str, wheels: Path) -> list[Step]:
    """Every op's benchmark."""
    others = (*PEERS, *SYSTEM)
    names = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    first = [name for name in BENCH_FIRST if name in names]
    rest = [name for name in names if name not in (*first, *others)]
    files = [HERE / f"bench_{name}.py" for name in (*first, *rest)]
    return [benchmark(path, device, "--seconds", "6", limit=75) for path in files]


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
    reason = lacking_reason(wheels)
    training = ("--seconds", "140", "--compile") if device == "cuda" else ("--recipe", "debug", "--rounds", "1")
    return [
        benchmark(HERE / "end_to_end.py", device, limit=210, left_out=reason),
        benchmark(HERE / "bench_training.py", device, *training, limit=200, left_out=reason),
        benchmark(HERE / "bench_vae.py", device, "--seconds", "30", limit=120, left_out=reason),
        benchmark(HERE / "bench_accelerate.py", device, "--seconds", "60", limit=150, left_out=reason),
    ]


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


def run_parts(parts: list[str], device: str, wheels: Path, limit: float) -> list[str]:
    """Run the parts' steps in order; returns a line for each that failed."""
    begin, failed = time.monotonic(), list[str]()
    for number, part in enumerate(parts):
        part_begin = time.monotonic()
        print(f"=== {part}", flush=True)
        importlib.invalidate_caches()  # an earlier part may have installed something
        kept = sum(KEPT_SECONDS.get(later, 0.0) for later in parts[number + 1 :])

        def left(kept: float = kept) -> float:
            return max(0.0, limit - kept - (time.monotonic() - begin))

        stopped = False
        for step, reason, seconds in run_steps(PARTS[part](device, wheels), TOGETHER.get(part, 1), left):
            if reason:
                failed.append(f"{part}: {step.name}: {reason}")
                stopped = stopped or step.vital
            print(f"--- {step.name}: {reason or 'done'}, {seconds:.0f} s", flush=True)
        print(f"=== {part} took {time.monotonic() - part_begin:.0f} s", flush=True)
        if os.environ.get("OUT"):
            pack(Path(os.environ["OUT"]))
        if stopped:
            print(f"nothing else makes sense after that: {failed[-1]}", flush=True)
            break
    return failed


def pack(folder: Path) -> Path:
    """All results as one file, since only few files come back from a rented machine."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "results.tar.gz"
    with tarfile.open(target, "w:gz") as archive:
        for path in (HERE / "results", HERE / "RESULTS.md", gpu_steps.LOGS):
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
    gpu_steps.hear_interrupts()
    begin = time.monotonic()
    shutil.rmtree(gpu_steps.LOGS, ignore_errors=True)
    failed = run_parts(options.parts or list(PARTS), options.device, options.wheels, options.limit)
    if os.environ.get("OUT"):
        print(f"packed: {Path(os.environ['OUT']) / 'results.tar.gz'}")
    print(f"gpu-check: {len(failed)} steps failed" if failed else "gpu-check: every step passed", end="")
    print(f", {time.monotonic() - begin:.0f} s", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
