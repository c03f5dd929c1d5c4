"""Completing one input into a saved scene, with everything that is printed about it; `complete` and `demo` call it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u4d.commands.arguments import Weights, existing, load_pipeline
from u4d.commands.clip import Clip, read_clip
from u4d.commands.comparison import compare, format_errors, known_truth, summary_errors
from u4d.commands.console import Bars, format_facts, format_table
from u4d.commands.output import check_scene_output
from u4d.errors import UserError

if TYPE_CHECKING:
    from u4d.evaluate import EvaluationReport, TrivialPriors
    from u4d.pipeline import Pipeline
    from u4d.scene import Scene

MOST_WINDOWS = 12  # that are printed
STAGES = ("load", "prepare", "denoise", "rank", "decode", "search", "compare", "save")


@dataclass(frozen=True)
class Job:
    """One completion: `u4d complete`'s options."""

    source: Path
    out: Path
    observe: str = "rgb:all"
    cameras: Path | None = None
    steps: int | None = None
    guidance: float | None = None
    candidates: int = 1
    halving: bool = False
    seed: int = 0
    frames: int | None = None
    window: int | None = None
    overlap: int | None = None
    prompt: str = ""
    weights: Weights = field(default_factory=Weights)
    original_size: bool = False
    lossless: bool = False
    overwrite: bool = False


def complete_to_folder(job: Job, priors: Callable[[int], TrivialPriors] | None = None) -> None:
    """Complete, compare with whatever truth the input holds, save, and print.

    Args:
        job: what to do.
        priors: gives the training averages for clips of so many frames, where trivial predictors shall use them.
    Raises:
        UserError: anything the user can mend; the output is then as it was.
    """
    existing(job.source, "INPUT")
    if job.cameras is not None:
        existing(job.cameras, "--cameras")
    if job.overlap is not None and job.window is None:
        raise UserError("--overlap: expected it together with --window, got it alone; it is what windows share")
    check_scene_output(job.out, job.overwrite)
    began = time.perf_counter()
    pipe = load_pipeline(job.weights)
    clip = read_short_clip(job, pipe) if job.window is None else read_long_clip(job, pipe, job.window)
    seconds = {"load": time.perf_counter() - began}
    print(opening(job, pipe, clip), flush=True)
    result = run_pipeline(pipe, job, clip)
    seconds |= result.report["timings_s"]
    began = time.perf_counter()
    truth = None if clip.completed else known_truth(clip.scene, clip.observation, result)
    evaluation, notes = None, clip.notes + result.report["notes"]
    if truth is not None:
        averages = None if priors is None else priors(result.num_frames)
        try:
            evaluation = compare(result, truth, clip.observation, averages)
        except UserError as error:  # a result is worth saving even where its comparison fails
            notes = [*notes, f"not compared with the input's own depth and cameras: {error}"]
        seconds["compare"] = time.perf_counter() - began
    result = with_report(result, clip, notes, evaluation)
    began = time.perf_counter()
    save(result, job, clip, truth, evaluation)
    seconds["save"] = time.perf_counter() - began
    print(closing(result, job, clip, seconds, evaluation))


def read_short_clip(job: Job, pipe: Pipeline) -> Clip:
    """The input's frames, sampled down to what the checkpoint takes at once."""
    most = int(pipe.transformer.config.num_frames)
    return read_clip(job.source, job.cameras, job.observe, min(job.frames or most, most))


def read_long_clip(job: Job, pipe: Pipeline, window: int) -> Clip:
    """All of the input's frames, or --frames of them; at the model's size where nothing larger is asked for."""
    from u4d.sample.window_plan import check_window

    config = pipe.transformer.config
    check_window(window, job.overlap, config.num_frames)
    size = None if job.original_size else (config.image_size[0], config.image_size[1])
    clip = read_clip(job.source, job.cameras, job.observe, job.frames, size)
    if job.frames is not None and job.frames > clip.scene.num_frames:
        raise UserError(
            f"--frames: expected at most the input's {clip.scene.num_frames} with --window, got {job.frames}; "
            "frames are added only without --window"
        )
    return clip


def run_pipeline(pipe: Pipeline, job: Job, clip: Clip) -> Scene:
    """The completion itself, under a progress bar."""
    steps, guidance = pipe.recommended(clip.observation)
    length: dict[str, Any] = (
        {"frames": job.frames} if job.window is None else {"window": job.window, "overlap": job.overlap}
    )
    with Bars("step") as bars:
        return pipe.complete(
            clip.scene,
            observe=clip.observation.spec,
            steps=job.steps or steps,
            guidance=guidance if job.guidance is None else job.guidance,
            candidates=job.candidates,
            halving=job.halving,
            seed=job.seed,
            prompt=job.prompt,
            original_size=job.original_size,
            progress=bars,
            **length,
        )


def with_report(result: Scene, clip: Clip, notes: list[str], evaluation: EvaluationReport | None) -> Scene:
    """The result, its report telling also where it came from and how it compares."""
    report = {**result.report, "source": clip.source, "notes": notes}
    if evaluation is not None:
        from u4d.evaluate.report import to_dict

        report["evaluation"] = to_dict(evaluation)
    return replace(result, report=report)


def save(result: Scene, job: Job, clip: Clip, truth: Scene | None, evaluation: EvaluationReport | None) -> None:
    """Write the folder, with the truth in its picture at the result's size."""
    if truth is not None and (truth.rgb is not None or truth.depth is not None):
        truth = truth.resized(result.image_size)
    result.save(
        job.out,
        lossless=job.lossless,
        overwrite=job.overwrite,
        source=clip.scene,
        truth=truth,
        errors=None if evaluation is None else summary_errors(evaluation),
    )


# --- what is printed -------------------------------------------------------------------------------------------------


def opening(job: Job, pipe: Pipeline, clip: Clip) -> str:
    """One line on what is about to happen."""
    kept, total = len(clip.source["kept"]), clip.source["frames"]
    frames = f"{total} frame{'s' if total != 1 else ''}" + (f", of which {kept} are taken" if kept < total else "")
    if job.window is not None and kept > job.window:
        frames += f", {job.window} at a time"
    weights = job.weights.checkpoint + ("" if job.weights.lora is None else f" with {job.weights.lora}")
    where = f"checkpoint {weights} on {pipe.work_device}"
    return f"{job.source}: {frames}; observed {clip.source['observe']}; {where}"


def closing(result: Scene, job: Job, clip: Clip, seconds: dict[str, float], evaluation: EvaluationReport | None) -> str:
    """The table at the end, the candidates, the errors where truth is known, and the notes."""
    parts = [format_facts(result_facts(result, job, seconds))]
    if "windows" in result.report:
        parts.append(format_windows(result))
    if "halving" in result.report:
        parts.append(format_halving(result))
    if len(result.report["errors"]) > 1:
        parts.append(format_candidates(result))
    if evaluation is not None:
        parts.append(format_errors(evaluation))
    if result.report["notes"]:
        parts.append("\n".join(f"note: {note}" for note in result.report["notes"]))
    return "\n" + "\n\n".join(parts)


def result_facts(result: Scene, job: Job, seconds: dict[str, float]) -> list[tuple[str, str]]:
    """What the result is, how well it agrees with itself, what it took and where it lies."""
    from u4d.view.facts import scene_facts

    report, agreement = result.report, result.report["consistency"]
    metric = bool(report["metric"])
    lengths = "metric: in the unit of the observed depth or cameras" if metric else "relative: no scale was given"
    height, width = result.image_size
    facts = [
        ("frames", f"{result.num_frames} at {result.fps:.4g} fps"),
        ("size", f"{width} x {height} pixels"),
        ("lengths", lengths),
        *scene_facts(result, None, " m" if metric else ""),
        ("reprojection error", f"{agreement['reprojection_error']:.4f} over {agreement['overlap']:.0%} of the pixels"),
    ]
    if agreement["frames_without_camera"]:
        facts.append(("without a camera fit", f"{agreement['frames_without_camera']} frames"))
    order = [stage for stage in STAGES if stage in seconds]
    order += [stage for stage in seconds if stage not in order]
    facts.append(("seconds", ", ".join(f"{stage} {seconds[stage]:.1f}" for stage in order)))
    facts.append(("memory, at most", f"{peak_memory_gib():.1f} GiB"))
    facts.append(("written to", f"{job.out}: {', '.join(sorted(part.name for part in job.out.iterdir()))}"))
    return facts


def format_candidates(result: Scene) -> str:
    """Every candidate's reprojection error and overlap, and which one was kept."""
    report = result.report
    table = [["candidate", "reprojection error", "overlap", ""]]
    for place, (number, error) in enumerate(zip(report["finished"], report["errors"], strict=True)):
        overlap = f"{report['overlap'][place]:.0%}" if report["overlap"] else "-"
        table.append([str(number), f"{error:.4f}", overlap, "kept" if number == report["best"] else ""])
    return format_table(table)


def format_halving(result: Scene) -> str:
    """Which candidates went on after each cut, and the range of their one-step errors beside all that were compared."""
    table = [["after step", "candidates", "error of one-step estimates", "went on"]]
    for cut in result.report["halving"]:
        errors = f"{min(cut['errors']):.4f} to {max(cut['errors']):.4f}"
        table.append([str(cut["after"]), str(len(cut["candidates"])), errors, ", ".join(map(str, cut["kept"]))])
    return format_table(table)


def format_windows(result: Scene) -> str:
    """Each window's frames, kept candidate, agreement with itself and offset that was taken out; a few where many."""
    windows = list(enumerate(result.report["windows"]))
    left_out = len(windows) - MOST_WINDOWS
    shown = windows if left_out <= 0 else windows[: MOST_WINDOWS // 2] + windows[-MOST_WINDOWS // 2 :]
    table = [["window", "frames", "candidate", "reprojection error", "overlap", "scale off", "turned by", "seconds"]]
    for k, window in shown:
        agreement, off = window["consistency"], window["offset"]
        table.append(
            [
                str(k),
                "{} to {}".format(*window["frames"]),
                f"{window['best']} of {window['drawn']}",
                f"{agreement['reprojection_error']:.4f}",
                f"{agreement['overlap']:.0%}",
                "-" if off is None else f"{1 / off['scale'] - 1:+.1%}",
                "-" if off is None else f"{off['rotation_deg']:.2f} deg",
                f"{sum(window['timings_s'].values()):.1f}",
            ]
        )
    told = "" if left_out <= 0 else f"\n{left_out} windows between these are in scene.json"
    return format_table(table) + told


def peak_memory_gib() -> float:
    """Most memory that the process has held, on the GPU where one was used."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 2**30
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**30
