"""What every benchmark shares: fair timing, the environment's description, and the JSON that RESULTS.md is made of.

A benchmark checks first that its versions agree, then times them in turns (so that a busy machine hits all alike), and
saves rows to benchmarks/results/<machine>/<op>.json. `python benchmarks/report.py` makes benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
L2_BYTES = 256 * 2**20  # more than any GPU's L2: filling so much evicts everything
LEAST_ROUNDS = 3  # however short time gets
UNKNOWN = "unknown"
COMMIT_VARIABLE = "U4D_COMMIT"

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Row:
    """One version of an op on one case.

    Attributes:
        case: the shapes, in words.
        version: "cpu kernel", "torch eager", ...
        ms: median milliseconds.
        low_ms, high_ms: the 10th and the 90th percentile.
        gb_per_s: bytes that must be moved over the median time, where that says something.
        limit_share: gb_per_s over what a plain copy reaches on this device in the same run.
        notes: whatever else was measured, e.g. {"peak_mb": 3.1}.
    """

    case: str
    version: str
    ms: float
    low_ms: float
    high_ms: float
    gb_per_s: float | None = None
    limit_share: float | None = None
    notes: dict[str, float | str] = field(default_factory=dict)


_deadline = math.inf  # of `time.perf_counter`, when measuring has to come to its end; see --seconds


class _StartClock(argparse.Action):
    """Stores --seconds, and counts from then on."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        limit_time(values)


def limit_time(seconds: float) -> None:
    """From now on measurements take about so long in all: fewer rounds where they would take longer."""
    global _deadline
    _deadline = time.perf_counter() + seconds


def time_for_one(wanted: float = math.inf) -> float:
    """Seconds that the next measurement may take: at most half of what is left, so that later ones get some, too."""
    return min(wanted, max(0.0, (_deadline - time.perf_counter()) / 2))


def time_left() -> float:
    """Seconds until --seconds are over; inf without it."""
    return _deadline - time.perf_counter()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--seconds", type=float, action=_StartClock, help="stop measuring early, so that all takes about so long"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<machine>/<op>.json")
    return parser


def measure(
    versions: Mapping[str, Callable[[], object]], device: str, rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each call. The versions take turns; on a GPU the L2 cache is cold and events do the timing."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    end = time.perf_counter() + time_for_one()
    for turn in range(warmup + rounds):
        if turn >= warmup + LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, call in versions.items():
            elapsed = _time_on_gpu(call) if device == "cuda" else time_on_cpu(call)
            if turn >= warmup:
                times[name].append(elapsed)
    return times


@contextmanager
def peak_memory(device: str, notes: dict[str, float | str]) -> Iterator[None]:
    """Writes the most memory that a block has held into the notes; on a CPU nothing."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    if device == "cuda":
        notes["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        notes["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9


def reason_of(error: BaseException) -> str:
    """Why something was not measured: the first line of what it says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def agreeing(
    versions: Mapping[str, Callable[[], Any]],
    check: Callable[[str, Callable[[], Any]], object],
    skipped: dict[str, str],
) -> dict[str, Callable[[], Any]]:
    """The versions that run and pass a check; of the others `skipped` tells why they don't.

    The first is what the benchmark is about: where it fails, so does the benchmark.
    """
    found: dict[str, Callable[[], Any]] = {}
    for name, call in versions.items():
        try:
            check(name, call)
        except (Exception, SystemExit) as error:
            if call is next(iter(versions.values())):
                raise
            skipped[name] = reason_of(error)
        else:
            found[name] = call
    return found


def forward(version: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Its result, without gradients."""
    with torch.no_grad():
        return (version(*given),)


def forward_backward(version: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of all that it is given; that of its result is one."""
    leaves = [x.detach().requires_grad_() for x in given]
    result = version(*leaves)
    return torch.autograd.grad(result, leaves, torch.ones_like(result))


def time_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _time_on_gpu(call: Callable[[], object]) -> float:
    torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def check_close(expected: tuple[Tensor, ...], found: tuple[Tensor, ...], tolerance: float, what: str) -> None:
    """Refuse to time versions that do not agree.

    Raises:
        SystemExit: they do not.
    """
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        worst = (a.double() - b.double()).abs().max().item()
        if not worst <= tolerance * (1 + a.double().abs().max().item()):
            raise SystemExit(f"{what}: output {number} is off by {worst:g}: nothing was measured")


def close_to(expected: tuple[Tensor, ...], tolerance: float) -> Callable[[str, Callable[[], Any]], None]:
    """`check_close` of what a version gives, for `agreeing`."""
    return lambda name, call: check_close(expected, call(), tolerance, name)


def row(
    case: str,
    version: str,
    times: list[float],
    moved_bytes: int | None = None,
    copy_rate: float | None = None,
    **notes: float | str,
) -> Row:
    """A row from the times of `measure`; `copy_rate` in bytes per second comes from `copy_bandwidth`."""
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    median = statistics.median(times)
    rate = moved_bytes / (median * 1e-3) if moved_bytes else None
    return Row(
        case=case,
        version=version,
        ms=median,
        low_ms=deciles[0],
        high_ms=deciles[-1],
        gb_per_s=rate / 1e9 if rate else None,
        limit_share=rate / copy_rate if rate and copy_rate else None,
        notes=dict(notes),
    )


def copy_bandwidth(device: str, megabytes: int = 512) -> float:
    """Bytes per second of a plain copy, counting what is read and what is written."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, device, rounds=5, warmup=1)["copy"]
    return 2 * source.numel() * 4 / (statistics.median(times) * 1e-3)


@cache
def environment(device: str, threads: int) -> Mapping[str, Any]:
    """What a number must be read with: machine, clocks, versions, commit; as it was when first asked for."""
    commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    if commit == UNKNOWN:  # a copy of the tree without its history
        commit = os.environ.get(COMMIT_VARIABLE, UNKNOWN)
    described: dict[str, Any] = {
        "machine": machine_name(device),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,driver_version"
        described["clocks"] = _output("nvidia-smi", query, "--format=csv,noheader")
        described["cuda"] = torch.version.cuda
    else:
        described["threads"] = threads
    return described


def machine_name(device: str) -> str:
    """The GPU's or the CPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = re.findall(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    return models[0].strip() if models else platform.processor() or platform.machine()


def save(op: str, rows: list[Row], device: str, threads: int, skipped: Mapping[str, str] | None = None) -> Path:
    """Write the rows of one op for this machine, in place of older ones; `skipped`: versions and why they lack."""
    described = environment(device, threads)
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", described["machine"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{op}.json"
    content: dict[str, Any] = {"op": op, "environment": dict(described), "rows": [asdict(one) for one in rows]}
    if skipped:
        content["skipped"] = dict(skipped)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def keep(op: str, rows: list[Row], options: argparse.Namespace, skipped: Mapping[str, str] | None = None) -> None:
    """Save what is there so far, if that was asked for: a run that is stopped leaves what it has."""
    if options.save:
        save(op, rows, options.device, options.threads, skipped)


def show(op: str, rows: list[Row], options: argparse.Namespace, skipped: Mapping[str, str] | None = None) -> None:
    """Print the rows and what was skipped, and save them if that was asked for."""
    print(f"{op} on {machine_name(options.device)}, {options.threads} threads, torch {torch.__version__}")
    for one in rows:
        rate = f"{one.gb_per_s:9.1f} GB/s" if one.gb_per_s is not None else ""
        share = f" = {100 * one.limit_share:.0f} % of a copy" if one.limit_share is not None else ""
        notes = "".join(
            f"  {name} {value:.3g}" if isinstance(value, float) else f"  {name} {value}"
            for name, value in one.notes.items()
        )
        spread = f"[{one.low_ms:.3f} .. {one.high_ms:.3f}]"
        print(f"  {one.case:32s} {one.version:22s} {one.ms:9.3f} ms {spread:22s}{rate}{share}{notes}")
    for name, reason in (skipped or {}).items():
        print(f"  skipped: {name}: {reason}")
    if options.save:
        print(f"saved to {save(op, rows, options.device, options.threads, skipped)}")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
