"""RUN/curves.png: log.jsonl as curves, of a finished run or one that still goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from u4d.diffusion.flow import STREAMS
from u4d.errors import UserError
from u4d.train.watch.log import LOG, over_targets, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
COLUMNS, PANEL, HEADER = 3, (5.2, 3.1), 0.75  # inches
SMOOTHED_OVER = 0.02  # of the run
COLOURS = ("#d1495b", "#2e86ab", "#3d9970", "#8e6bbf", "#e8a33d", "#5c6270")
INK, FAINT = "#2b2f36", "#8a919c"
METRICS = {
    "abs_rel": "AbsRel, lower is better",
    "delta_1_25": "delta < 1.25, higher is better",
    "translation_direction_deg": "translation direction, degrees",
    "rotation_first_to_last_deg": "rotation first to last, degrees",
}

Log = Sequence[dict[str, Any]]
Draw = Callable[["Axes", Log], None]


def plot_run(run: Path, out: Path | None = None) -> Path:
    """Draw a run's log.

    Args:
        run: the run's folder.
        out: the PNG to write; None for `curves.png` in that folder.
    Returns:
        the PNG.
    Raises:
        UserError: the folder holds no log, or one without a step.
    """
    if not (run / LOG).is_file():
        raise UserError(f"{run}: expected the folder of a training run, got one without {LOG}; see u4d train --help")
    log = read_log(run / LOG)
    if not any("loss" in line for line in log):
        raise UserError(f"{run / LOG}: expected at least one step, got none yet; try again when the run has begun")
    path = run / CURVES if out is None else out
    figure = figure_of(log)
    figure.text(0.01, 1 - 0.3 / figure.get_figheight(), run.resolve().name, fontsize=14, color=INK, va="center")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise UserError(f"{path}: expected a place that can be written to, got: {error.strerror or error}") from error
    return path


def figure_of(log: Log) -> Figure:
    """The curves of a log's lines: a panel for everything that the log knows (older logs know less)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of(log)
    rows = -(-len(panels) // COLUMNS)
    style: dict[Any, Any] = {"text.color": INK, "axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT}
    style |= {"axes.edgecolor": "#c9cdd4", "axes.titlesize": 11, "axes.titlelocation": "left", "legend.fontsize": 8}
    with rc_context({**style, "axes.spines.top": False, "legend.frameon": False}):
        height = rows * PANEL[1] + HEADER
        figure = Figure(figsize=(COLUMNS * PANEL[0], height), facecolor="white")
        FigureCanvasAgg(figure)
        figure.subplots_adjust(0.045, 0.5 / height, 0.96, 1 - HEADER / height, wspace=0.3, hspace=0.42)
        for place, (title, draw) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, COLUMNS, place)
            axes.set_title(title)
            axes.set_xlabel("steps")
            draw(axes, log)
    return figure


def panels_of(log: Log) -> dict[str, Draw]:
    """Title and drawing of every panel that this log has something for."""
    panels: dict[str, Draw] = {
        "training loss": draw_total,
        "training loss per stream": draw_streams,
        "gradient norm before clipping": draw_norm,
    }
    if any("lr" in line for line in log):
        panels["learning rate"] = draw_rate
    panels["speed"] = draw_speed
    if any("validation" in line for line in log):
        panels["validation loss per pattern"] = draw_patterns
        for name, title in METRICS.items():
            panels[title] = partial(draw_metric, name=name)
        panels["correlation of the motion with the truth"] = draw_correlations
    return panels


def draw_total(axes: Axes, log: Log) -> None:
    """The loss that is minimised."""
    steps, lines = training(log)
    both(axes, steps, [total_of(line) for line in lines], INK)


def draw_streams(axes: Axes, log: Log) -> None:
    """A line per stream; there is none where a step supervises nothing of it."""
    steps, lines = training(log)
    for index, (stream, colour) in enumerate(zip(STREAMS, COLOURS, strict=False)):
        both(axes, steps, [value(line["loss"][index]) or math.nan for line in lines], colour, stream)
    axes.legend(ncols=2)


def draw_norm(axes: Axes, log: Log) -> None:
    """On a logarithmic scale: what matters is a jump."""
    steps, lines = training(log)
    both(axes, steps, [value(line.get("grad_norm")) for line in lines], INK)
    axes.set_yscale("log")


def draw_rate(axes: Axes, log: Log) -> None:
    """The learning rate."""
    steps, lines = training(log)
    axes.plot(steps, [value(line.get("lr")) for line in lines], color=INK)


def draw_speed(axes: Axes, log: Log) -> None:
    """Clips (older logs: steps) a second, and the share of the time that waits for data."""
    steps, lines = training(log)
    seconds = np.array([value(line.get("seconds")) for line in lines])
    clips = np.array([value(line.get("clips", 1)) for line in lines])
    waited = np.array([value(line.get("data_wait")) for line in lines])
    with np.errstate(divide="ignore", invalid="ignore"):
        pace, share = clips / seconds, 100 * waited / seconds
    both(axes, steps, np.where(np.isfinite(pace), pace, math.nan), COLOURS[1])
    axes.set_ylabel("clips per second" if any("clips" in line for line in lines) else "steps per second")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.plot(steps, smooth(np.where(np.isfinite(share), share, math.nan)), color=COLOURS[4])
    right.set_ylabel("waiting for data, %", color=COLOURS[4])
    right.set_ylim(0, 100)


def draw_patterns(axes: Axes, log: Log) -> None:
    """The loss of each pattern, over the streams that are its targets."""
    steps, found = validations(log)
    patterns = dict.fromkeys(pattern for result in found for pattern in result["loss"])
    for pattern, colour in zip(patterns, COLOURS, strict=False):
        losses = [over_targets([value(loss) for loss in result["loss"].get(pattern, ())]) for result in found]
        axes.plot(steps, losses, ".-", color=colour, label=pattern)
    axes.legend(ncols=2)


def draw_metric(axes: Axes, log: Log, name: str) -> None:
    """A metric of dense completion in one step, and of the predictor that does not look."""
    steps, found = validations(log)
    axes.plot(steps, [value(result["metrics"].get(name)) for result in found], ".-", color=INK, label="model")
    trivial = [value(result["trivial"].get(name)) for result in found]
    axes.plot(steps, trivial, "_--", color=FAINT, label="trivial")
    axes.legend()


def draw_correlations(axes: Axes, log: Log) -> None:
    """Of predicted and true first-to-last motion, over the validation clips."""
    steps, found = validations(log)
    names = dict.fromkeys(name for result in found for name in result["correlations"])
    for name, colour in zip(names, COLOURS, strict=False):
        values = [value(result["correlations"].get(name)) for result in found]
        axes.plot(steps, values, ".-", color=colour, label=name)
    axes.set_ylim(-1, 1)
    axes.legend(ncols=3)


def training(log: Log) -> tuple[list[int], Log]:
    """Steps done, and the lines that say so."""
    lines = [line for line in log if "loss" in line]
    return [line["step"] + 1 for line in lines], lines


def validations(log: Log) -> tuple[list[int], list[dict[str, Any]]]:
    """Steps done, and what was found then."""
    lines = [line for line in log if "validation" in line]
    return [line["step"] for line in lines], [line["validation"] for line in lines]


def total_of(line: dict[str, Any]) -> float:
    """What was minimised: in older logs, which do not say, all streams weigh the same."""
    return value(line["total"]) if "total" in line else float(np.mean([value(loss) for loss in line["loss"]]))


def value(found: float | None) -> float:
    """A number of the log; NaN for null."""
    return math.nan if found is None else float(found)


def both(axes: Axes, steps: Sequence[int], values: Sequence[float] | np.ndarray, colour: str, label: str = "") -> None:
    """The raw values faintly, and smoothed."""
    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(steps, smooth(np.asarray(values, dtype=float)), color=colour, label=label or None)


def smooth(values: np.ndarray) -> np.ndarray:
    """A weighted mean of each value and those before it, over about `SMOOTHED_OVER` of them; NaN counts nothing."""
    keep = 1 - 1 / max(1.0, SMOOTHED_OVER * len(values))
    result, total, weight = np.full(len(values), math.nan), 0.0, 0.0
    for index, current in enumerate(values):
        known = math.isfinite(current)
        total, weight = keep * total + (current if known else 0.0), keep * weight + known
        if known:
            result[index] = total / weight
    return result
