"""log.jsonl: a line of JSON for every step, and lines of another kind for validations."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u4d.errors import UserError
from u4d.train.watch.validate import Validation

LOG = "log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step over all processes.

    Attributes:
        step: its number, from 0.
        loss: of each stream.
        total: what was minimised.
        grad_norm: before clipping.
        lr: learning rate.
        seconds: wall time of the step, waiting for data included.
        data_wait: seconds of it spent waiting for data.
        clips: clips in the batch.
        flops: of the model, forward and backward, without anything computed twice.
        bad_clips: clips that could not be read so far.
    """

    step: int
    loss: tuple[float, ...]
    total: float
    grad_norm: float
    lr: float
    seconds: float
    data_wait: float
    clips: int
    flops: float
    bad_clips: int


def step_line(record: StepRecord) -> dict[str, Any]:
    """A step as it stands in the log."""
    return {
        "step": record.step,
        "loss": [number(value) for value in record.loss],
        "total": number(record.total),
        "grad_norm": number(record.grad_norm),
        "lr": number(record.lr),
        "seconds": number(record.seconds),
        "data_wait": number(record.data_wait),
        "clips": record.clips,
        "tflops": number(rate(record.flops, record.seconds) / 1e12),
        "bad_clips": record.bad_clips,
    }


def validation_line(result: Validation) -> dict[str, Any]:
    """A validation as it stands in the log."""
    return {
        "step": result.step,
        "validation": {
            "loss": {pattern: [number(value) for value in losses] for pattern, losses in result.losses.items()},
            "metrics": {name: number(value) for name, value in result.metrics.items()},
            "trivial": {name: number(value) for name, value in result.trivial.items()},
            "correlations": {name: number(value) for name, value in result.correlations.items()},
        },
    }


def number(value: float) -> float | None:
    """Six digits; None, JSON's null, for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def cut_log(out: Path, step: int) -> None:
    """Drop what the log says of `step` and later steps, and a last line that was torn when the run was stopped.

    A validation is numbered by the steps done before it, so one made at `step` stays.

    Raises:
        UserError: a line that can't be read, other than the last.
    """
    path = out / LOG
    if not path.exists():
        return
    kept = [line for line in read_log(path) if line["step"] < step + ("validation" in line)]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, steps and validations; a torn last line is left out.

    Raises:
        UserError: no such file, or a line that can't be read, other than the last.
    """
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: expected the log of a training run, got: {error.strerror or error}") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        if number == len(texts):  # what follows the last line's end: nothing, or a torn line
            break
        try:
            line = json.loads(text)
            whole = isinstance(line, dict) and isinstance(line.get("step"), int)
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"{path}: line {number}: expected JSON with a step, got {text[:60]!r}; delete that line")
        lines.append(line)
    return lines


def rate(amount: float, seconds: float) -> float:
    """Amount per second; NaN where no time has passed."""
    return amount / seconds if seconds > 0 else math.nan


def over_targets(losses: Sequence[float]) -> float:
    """Mean loss of the streams that have targets; NaN where none has."""
    targets = [value for value in losses if not math.isnan(value)]
    return sum(targets) / len(targets) if targets else math.nan
