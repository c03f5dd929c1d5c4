"""Commands with time limits, one after the other or side by side: what `gpu_check` runs its parts with."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu-check"
TAIL = 60  # lines of a log that are shown
GRACE_SECONDS = 10.0  # between asking a step to end, so that it tells what it knows, and killing it


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: what the summary calls it.
        command: program and arguments.
        limit: seconds after which it is killed; it counts as failed then.
        environment: variables besides our own.
        left_out: why it is not run, which is no failure; the empty string where it is.
        fine: exit codes that are no failure.
        vital: without it nothing else makes sense.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    left_out: str = ""
    fine: tuple[int, ...] = (0,)
    vital: bool = False


def run_step(step: Step, seconds: float, output: IO[bytes] | None = None) -> str:
    """Run a step; returns why it failed, or the empty string.

    Args:
        seconds: what is left of the whole time.
        output: where it writes to; our own output without it.
    """
    limit = min(step.limit, seconds)
    if limit < 1:
        return "no time was left for it"
    python_path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **step.environment}
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=environment, start_new_session=True, stdout=output, stderr=output
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"stopped after {limit:.0f} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return "" if code in step.fine else f"exit code {code}"


def hear_interrupts() -> None:
    """Let steps be asked to end also in a shell's background job, which ignores SIGINT as its children do."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a step and what it started (compilers, workers): its session. Asked first, pytest tells what has failed."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may take its time to end a kernel that hangs
        process.wait(GRACE_SECONDS)


def run_logged(step: Step, seconds: float) -> tuple[str, Path]:
    """Run a step beside others: its output goes to a file."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{re.sub(r'[^a-z0-9_]+', '-', step.name.lower())}.log"
    with path.open("wb") as file:
        return run_step(step, seconds, file), path


def run_steps(steps: list[Step], together: int, left: Callable[[], float]) -> Iterator[tuple[Step, str, float]]:
    """Each step that is not left out, why it failed if it did, and its seconds; nothing comes after a vital failure."""
    wanted = []
    for step in steps:
        if step.left_out:
            print(f"--- {step.name} left out: {step.left_out}", flush=True)
        else:
            wanted.append(step)
    if together == 1:
        for step in wanted:
            begin = time.monotonic()
            reason = run_step(step, left())
            yield step, reason, time.monotonic() - begin
            if reason and step.vital:
                return
        return

    def run(step: Step) -> tuple[str, Path, float]:
        begin = time.monotonic()
        return *run_logged(step, left()), time.monotonic() - begin

    with ThreadPoolExecutor(together) as pool:
        for step, (reason, log, seconds) in zip(wanted, pool.map(run, wanted), strict=True):
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            print("\n".join(lines[-TAIL:] if reason else lines[-1:]), flush=True)
            yield step, reason, seconds
