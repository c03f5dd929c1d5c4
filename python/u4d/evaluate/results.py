"""What an evaluation found: one row per predictor, one value per clip and metric. Formatting is in `report.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from u4d.errors import UserError


@dataclass(frozen=True)
class Metric:
    """How a metric is named and read."""

    label: str
    better: Literal["lower", "higher"]
    decimals: int
    group: str


# In the order of the tables. Keys are those of the metric functions.
METRICS: Mapping[str, Metric] = {
    "abs_rel": Metric("AbsRel", "lower", 3, "depth"),
    "rmse": Metric("RMSE", "lower", 3, "depth"),
    "delta_1_25": Metric("delta < 1.25", "higher", 3, "depth"),
    "psnr_depth": Metric("channel PSNR, dB", "higher", 2, "depth"),
    "translation_direction_deg": Metric("translation direction, deg", "lower", 1, "camera"),
    "rotation_first_to_last_deg": Metric("rotation first to last, deg", "lower", 2, "camera"),
    "rpe_r_deg": Metric("RPE_r, deg per frame", "lower", 3, "camera"),
    "rpe_t": Metric("RPE_t", "lower", 4, "camera"),
    "ate": Metric("ATE", "lower", 4, "camera"),
    "ate_over_path": Metric("ATE / path length", "lower", 4, "camera"),
    "focal_error": Metric("focal length error", "lower", 3, "camera"),
    "psnr": Metric("PSNR, dB", "higher", 2, "images"),
    "ssim": Metric("SSIM", "higher", 3, "images"),
}


@dataclass(frozen=True)
class Summary:
    """Over the clips for which the metric is defined; `count` says how many those are. NaN where there is none."""

    mean: float
    median: float
    count: int


@dataclass(frozen=True)
class Row:
    """One predictor.

    Attributes:
        name: what the tables call it.
        trivial: whether it predicts without looking at the clip.
        values: per metric one value per clip, in the order of the clips; NaN where the clip does not define it.
        correlations: Pearson r over clips of the first-to-last motion's components; empty without cameras.
    """

    name: str
    trivial: bool
    values: dict[str, tuple[float, ...]]
    correlations: dict[str, float] = field(default_factory=dict)

    def summary(self, metric: str) -> Summary:
        """Mean, median and count over clips.

        Raises:
            UserError: a metric that this row does not have.
        """
        if metric not in self.values:
            raise UserError(f"metric: expected one of {', '.join(self.values)} for {self.name!r}, got {metric!r}")
        defined = [value for value in self.values[metric] if not math.isnan(value)]
        if not defined:
            return Summary(math.nan, math.nan, 0)
        return Summary(statistics.fmean(defined), statistics.median(defined), len(defined))


@dataclass(frozen=True)
class EvaluationReport:
    """The outcome of `evaluate` or `evaluate_codec`.

    Attributes:
        title: what was evaluated.
        settings: how, as plain values (observe, steps, guidance, ...).
        alignments: per kind of metric, how predictions were brought to the truth, in words.
        rows: the model first, then the trivial predictors.
        clips: how many clips.
        seconds_per_clip: wall time of the model alone, mean.
    """

    title: str
    settings: dict[str, Any]
    alignments: dict[str, str]
    rows: tuple[Row, ...]
    clips: int
    seconds_per_clip: float

    def row(self, name: str) -> Row:
        """The row of this name.

        Raises:
            UserError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(f"row: expected one of {', '.join(r.name for r in self.rows)}, got {name!r}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that some row defines for some clip, in the order of the tables."""
        found = {name for row in self.rows for name in row.values if row.summary(name).count}
        return tuple(name for name in METRICS if name in found)
