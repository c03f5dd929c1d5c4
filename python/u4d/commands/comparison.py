"""A result beside the truth: scored by `u4d.evaluate`, and as the short tables that `complete` and `demo` print."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from u4d.commands.console import Bars, format_table

if TYPE_CHECKING:
    from u4d.evaluate import EvaluationReport, TrivialPriors
    from u4d.sample.observation import Observation
    from u4d.scene import Scene

SHOWN = (
    "abs_rel",
    "delta_1_25",
    "ate",
    "ate_over_path",
    "rotation_first_to_last_deg",
    "translation_direction_deg",
    "focal_error",
    "psnr",
)
OURS = "u4d"
ARROWS = {"lower": "lower is better", "higher": "higher is better"}
PRIOR_CLIPS = 32
PRIOR_SIZE = (24, 32)  # the averages are smooth: a small rendering tells as much, many times faster


@dataclass(frozen=True, eq=False)
class Finished:
    """A pipeline that has already answered."""

    result: Scene

    def complete(self, scene: Scene, *, observe: str, steps: int, guidance: float, candidates: int, seed: int) -> Scene:
        return self.result


def known_truth(scene: Scene, observation: Observation, result: Scene) -> Scene | None:
    """What the input knows beyond what was observed, frame for frame like the result; None where that is nothing."""
    frames = result.report["frames"]
    if len(frames) != result.num_frames:
        return None  # the result has frames that the input has not
    open_rgb = scene.rgb is not None and not bool(observation.rgb.all())
    open_depth = scene.depth is not None and not bool(observation.depth.all())
    open_camera = scene.cam_to_world is not None and not bool(observation.camera.all())
    return scene.frames(frames) if open_rgb or open_depth or open_camera else None


def compare(
    result: Scene, truth: Scene, observation: Observation, priors: TrivialPriors | None = None
) -> EvaluationReport:
    """Score a finished result against the truth over what was not observed.

    Args:
        result, truth: of the same frames.
        observation: what of these frames was observed.
        priors: training averages for the trivial rows that need them.
    Raises:
        UserError: nothing can be compared.
    """
    from u4d.evaluate import evaluate

    settings = {key: result.report[key] for key in ("steps", "guidance", "seed")}
    return evaluate(Finished(result), [truth], observe=observation.spec, priors=priors, **settings)


def training_averages(num_frames: int, clips: int = PRIOR_CLIPS) -> TrivialPriors:
    """What our training scenes say before anything is seen, from small renderings."""
    from u4d.data import ProceduralScenes
    from u4d.evaluate import fit_priors

    scenes = ProceduralScenes("train", frames=num_frames, size=PRIOR_SIZE)
    with Bars("clip") as bars:

        def rendered() -> Iterator[Scene]:
            for index in range(clips):
                yield scenes[index]
                bars("training averages", index + 1, clips)

        return fit_priors(rendered())


def format_errors(report: EvaluationReport) -> str:
    """The errors of one clip: metrics are lines, predictors columns; one table for depth, cameras and images each."""
    from u4d.evaluate.results import METRICS

    tables = []
    names = [name for name in SHOWN if name in report.metrics]
    for group in dict.fromkeys(METRICS[name].group for name in names):
        of_group = [name for name in names if METRICS[name].group == group]
        rows = [row for row in report.rows if any(name in row.values for name in of_group)]
        table = [[f"{group} against the truth", *(row.name if row.trivial else OURS for row in rows), ""]]
        for name in of_group:
            metric = METRICS[name]
            cells = [f"{row.values[name][0]:.{metric.decimals}f}" if name in row.values else "-" for row in rows]
            table.append([metric.label, *cells, ARROWS[metric.better]])
        tables.append(format_table(table))
    groups = {METRICS[name].group for name in names}
    aligned = {"depth": "depth", "pose": "camera"}
    notes = [f"{kind} alignment: {text}" for kind, text in report.alignments.items() if aligned[kind] in groups]
    return "\n\n".join([*tables, *(["\n".join(notes)] if notes else [])])


def summary_errors(report: EvaluationReport) -> dict[str, dict[str, float]]:
    """Ours and the best trivial predictor's value of every shown metric, for summary.png."""
    from u4d.evaluate.results import METRICS

    ours, *trivial = report.rows
    table = {}
    for name in SHOWN:
        if name in ours.values:
            metric = METRICS[name]
            others = [row.values[name][0] for row in trivial if name in row.values]
            best = min if metric.better == "lower" else max
            table[metric.label] = {OURS: ours.values[name][0]} | ({"best trivial": best(others)} if others else {})
    return table
