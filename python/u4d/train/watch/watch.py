"""What can be seen of a run while it goes on: a progress bar, log.jsonl, TensorBoard's events, validation pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from u4d.diffusion.flow import STREAMS
from u4d.train.cost.peaks import peak_flops
from u4d.train.watch.log import LOG, StepRecord, cut_log, over_targets, rate, step_line, validation_line
from u4d.train.watch.validate import Validation

__all__ = ["StepRecord", "Watch", "cut_log", "peak_flops"]

EVENTS, PICTURES = "tensorboard", "validation"
NO_TENSORBOARD = "the package tensorboard is not installed, so there are no events of this run, only this log"
SMOOTHING = 0.95  # share of the past in the bar's rates


@dataclass(frozen=True)
class Pace:
    """Sums over the last steps, older ones counting less; their ratios are the smoothed rates."""

    seconds: float = 0.0
    data_wait: float = 0.0
    clips: float = 0.0
    flops: float = 0.0

    def after(self, record: StepRecord) -> Pace:
        """The sums with one more step."""
        return Pace(**{name: SMOOTHING * past + getattr(record, name) for name, past in asdict(self).items()})


class Watch:
    """Shows and writes steps and validations. In all but the main process nothing happens.

    The log is cut back to `first_step` (see `cut_log`), and every line is in the file before the call returns.
    """

    def __init__(
        self, out: Path, first_step: int, steps: int, *, main: bool, progress: bool, peak_flops: float | None
    ) -> None:
        """Open the log of a run.

        Args:
            out: the run's folder.
            first_step: the step to come; 0 for a new run.
            steps: of the whole run.
            main: whether this is the process that writes.
            progress: show a bar.
            peak_flops: of all devices of the run together; None where unknown, then TFLOP/s stand for MFU.
        """
        self.out, self.main, self.peak_flops = out, main, peak_flops
        self.pace, self.stack = Pace(), ExitStack()
        if not main:
            return
        out.mkdir(parents=True, exist_ok=True)
        cut_log(out, first_step)
        self.events = open_events(out / EVENTS, first_step)
        self.note = NO_TENSORBOARD if self.events is None else ""
        if self.events is not None:
            self.stack.callback(self.events.close)
        self.bar = self.stack.enter_context(tqdm(initial=first_step, total=steps, disable=not progress, unit="step"))

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, record: StepRecord) -> None:
        """After every step."""
        if not self.main:
            return
        line = step_line(record)
        self._write(line | {"note": self.note} if self.note else line)
        self.note = ""
        self._add_scalars(step_scalars(record, self.peak_flops), record.step + 1)
        self.pace = self.pace.after(record)
        self.bar.set_postfix_str(postfix(record, self.pace, self.peak_flops), refresh=False)
        self.bar.update()

    def validation(self, result: Validation) -> None:
        """After every validation; its picture is `validation/step_00001200.png`."""
        if not self.main:
            return
        save_picture(self.out / PICTURES / f"step_{result.step:08d}.png", result)
        self._write(validation_line(result))
        self._add_scalars(validation_scalars(result), result.step)
        if self.events is not None:
            self.events.add_image("validation", result.grid, result.step, dataformats="HWC")
            self.events.flush()
        if not self.bar.disable:
            self.bar.write(validation_text(result))

    def close(self) -> None:
        """End the bar and the files; more than once is no harm."""
        self.stack.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        with open(self.out / LOG, "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        if self.events is not None:
            for name, value in scalars.items():
                if not math.isnan(value):  # not defined: a stream without targets
                    self.events.add_scalar(name, value, step)


def open_events(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer, or None where the package is not installed. Events are numbered by steps done."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What an interrupted run wrote beyond its saved state is hidden from the curves.
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def step_scalars(record: StepRecord, peak: float | None) -> dict[str, float]:
    """TensorBoard's names for a step's numbers."""
    flops = rate(record.flops, record.seconds)
    return {
        **{f"loss/{stream}": value for stream, value in zip(STREAMS, record.loss, strict=True)},
        "loss/total": record.total,
        "training/grad_norm": record.grad_norm,
        "training/lr": record.lr,
        "training/bad_clips": record.bad_clips,
        "speed/clips_per_second": rate(record.clips, record.seconds),
        "speed/data_wait": rate(record.data_wait, record.seconds),
        "speed/tflops": flops / 1e12,
        **({} if peak is None else {"speed/mfu": flops / peak}),
    }


def validation_scalars(result: Validation) -> dict[str, float]:
    """TensorBoard's names for a validation's numbers."""
    losses = {
        f"validation_{pattern}/{stream}": value
        for pattern, values in result.losses.items()
        for stream, value in zip(STREAMS, values, strict=True)
    }
    metrics = {f"validation/{name}": value for name, value in result.metrics.items()}
    trivial = {f"validation/{name}_trivial": value for name, value in result.trivial.items()}
    correlations = {f"correlation/{name}": value for name, value in result.correlations.items()}
    return {**losses, **metrics, **trivial, **correlations}


def postfix(record: StepRecord, pace: Pace, peak: float | None) -> str:
    """The bar's words: `rgb .412 depth .310 ... | grad 1.20 | 95.1 clips/s | MFU 41% | wait 2%`."""
    flops = rate(pace.flops, pace.seconds)
    words = [
        " ".join(f"{stream} {value:.3f}" for stream, value in zip(STREAMS, record.loss, strict=True)),
        f"grad {record.grad_norm:.2f}",
        f"{rate(pace.clips, pace.seconds):.1f} clips/s",
        f"{flops / 1e12:.3g} TFLOP/s" if peak is None else f"MFU {flops / peak:.0%}",
        f"wait {rate(pace.data_wait, pace.seconds):.0%}",
    ]
    return " | ".join(words + ([f"{record.bad_clips} bad clips"] if record.bad_clips else []))


def validation_text(result: Validation) -> str:
    """A validation in one line, the trivial predictor's numbers in brackets."""
    found, trivial = result.metrics, result.trivial

    def beside(name: str, decimals: int) -> str:
        return f"{found[name]:.{decimals}f} ({trivial[name]:.{decimals}f})"

    losses = " ".join(f"{name} {over_targets(values):.3f}" for name, values in result.losses.items())
    return (
        f"step {result.step}: loss {losses} | AbsRel {beside('abs_rel', 3)} | delta<1.25 {beside('delta_1_25', 3)} | "
        f"direction {beside('translation_direction_deg', 1)} deg | "
        f"rotation {beside('rotation_first_to_last_deg', 2)} deg"
    )


def save_picture(path: Path, result: Validation) -> None:
    """Write the grid by renaming a finished file."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    Image.fromarray(result.grid).save(partial, format="PNG")
    os.replace(partial, path)
