"""Timing one version without a pause, as in a long run: a GPU's clock falls under load."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterator

import harness
import torch

LEAST_SECONDS = 0.2  # however short time gets
WARMING = 0.25  # of the time: clocks and temperature settle, and these calls do not count
QUEUED = 8  # calls that wait on the GPU, so that it never waits for Python


def arguments(description: str, seconds: float) -> argparse.ArgumentParser:
    """The options of benchmarks that measure so."""
    parser = harness.arguments(description)
    parser.add_argument("--sustain", type=float, default=seconds, help="seconds of each measurement")
    return parser


def measure_sustained(call: Callable[[], object], device: str, seconds: float) -> tuple[list[float], dict[str, float]]:
    """One version alone and without a pause, as in a long run: a GPU's clock falls under load.

    Args:
        seconds: how long; fewer where --seconds leaves less.
    Returns:
        Milliseconds of each call after the first quarter of that time, and what the GPU said of itself halfway:
        {"sm_mhz", "watts"}, empty where it says nothing.
    """
    seconds = max(min(LEAST_SECONDS, seconds), harness.time_for_one(seconds))
    times: list[float] = []
    state: dict[str, float] | None = None
    call()  # what is compiled at the first call
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for done, elapsed in run_without_pause(call, device):
        spent = done - start
        if spent > WARMING * seconds:
            times.append(elapsed)
        if state is None and spent > seconds / 2:
            state = gpu_state() if device == "cuda" else {}
        if spent > seconds and len(times) >= harness.LEAST_ROUNDS:
            break
    return times, state or {}


def run_without_pause(call: Callable[[], object], device: str) -> Iterator[tuple[float, float]]:
    """For ever: when a call was over, and its milliseconds."""
    if device != "cuda":
        while True:
            elapsed = harness.time_on_cpu(call)
            yield time.perf_counter(), elapsed
    queue: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        queue.append((start, end))
        if len(queue) > QUEUED:
            first, last = queue.popleft()
            last.synchronize()
            yield time.perf_counter(), float(first.elapsed_time(last))


def gpu_state() -> dict[str, float]:
    """What the GPU says of itself now; nothing where NVML can't be asked."""
    try:
        return {"sm_mhz": float(torch.cuda.clock_rate()), "watts": torch.cuda.power_draw() / 1e3}
    except Exception:  # no pynvml, or any of its own errors: a time without a clock is still a time
        return {}
