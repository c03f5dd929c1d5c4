"""Run a pipeline over clips with known truth, beside predictors that do not look (spec, section 5).

The evaluation is honest by construction: the pipeline receives a scene from which everything unobserved has been
removed, and only frames that were not observed are scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.evaluate.depth_metrics import ALIGNMENT_TEXT, DepthAlignment, depth_metrics
from u4d.evaluate.image_metrics import psnr, ssim
from u4d.evaluate.pose_metrics import (
    POSE_ALIGNMENT_TEXT,
    component_correlations,
    focal_error,
    motion_components,
    pose_metrics,
)
from u4d.evaluate.results import EvaluationReport, Row
from u4d.evaluate.trivial import (
    TrivialPriors,
    blend_frames,
    constant_depth,
    mean_depth,
    mean_intrinsics,
    mean_motion,
    static_camera,
    straight_line,
)
from u4d.geometry.depth import clip_scale, valid_depth
from u4d.sample.observation import Observation, check_scene_has, parse_observation
from u4d.scene import Scene

MODEL = "model"
GREY = 0.5
# A camera that moves less than this share of the clip's median depth has no direction worth predicting.
MIN_MOTION_IN_SCALES = 0.01

Progress = Callable[[int, int | None], None]


class Completes(Protocol):
    """What is evaluated: `u4d.Pipeline`, or anything with its `complete`."""

    def complete(
        self, scene: Scene, *, observe: str, steps: int, guidance: float, candidates: int, seed: int
    ) -> Scene: ...


@dataclass(frozen=True, eq=False)
class Prediction:
    """One predictor's answer for one clip; `None` is what it says nothing about. Shapes as in `Scene`."""

    rgb: Tensor | None = None
    depth: Tensor | None = None
    intrinsics: Tensor | None = None
    cam_to_world: Tensor | None = None
    scale: float = math.nan  # in the unit of its own camera centres; NaN where unknown


@dataclass(frozen=True, eq=False)
class Outcome:
    """One predictor's numbers for one clip, and its first-to-last motion beside the true one, in scales."""

    scores: dict[str, float] = field(default_factory=dict)
    motion: tuple[Tensor, Tensor] | None = None


def evaluate(
    pipe: Completes,
    scenes: Iterable[Scene],
    *,
    observe: str = "rgb:all",
    steps: int = 40,
    guidance: float = 2.0,
    candidates: int = 1,
    clips: int | None = None,
    seed: int = 0,
    alignment: DepthAlignment = "scale",
    priors: TrivialPriors | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Complete every clip from what `observe` gives and compare the rest with the truth.

    Args:
        pipe: the pipeline.
        scenes: clips with their truth; what a clip does not know is not scored. Read one by one.
        observe: observation spec, e.g. "rgb:all" or "rgb:0,-1".
        steps, guidance, candidates: passed on to `pipe.complete`.
        clips: at most so many clips; all, if None.
        seed: clip k is completed with seed + k.
        alignment: of depth. Without metric observations outputs are relative, hence "scale"; see `depth_metrics`.
        priors: training averages, from `trivial.fit_priors`; without them the rows that need them are left out.
        progress: called as progress(clips done, clips in all or None if unknown).
    Returns:
        A report whose first row is the model's.
    Raises:
        UserError: no clip, a spec that does not fit a clip, a clip in which nothing unobserved is known, or a
            prediction with another number of frames or values that are not finite; the message names the clip.
    """
    total = _count(scenes, clips)
    outcomes: list[dict[str, Outcome]] = []
    seconds = 0.0
    for index, truth in enumerate(islice(scenes, clips)):
        try:
            observation = parse_observation(observe, truth.num_frames)
            check_scene_has(observation, truth)
            given = only_observed(truth, observation)
            started = time.perf_counter()
            completed = pipe.complete(
                given, observe=observe, steps=steps, guidance=guidance, candidates=candidates, seed=seed + index
            )
            seconds += time.perf_counter() - started
            answers = {MODEL: _as_prediction(completed, truth)} | _trivial_answers(truth, observation, priors)
            outcomes.append({name: _outcome(answer, truth, observation, alignment) for name, answer in answers.items()})
        except UserError as error:
            raise UserError(f"clip {index}: {error}") from error
        if not outcomes[-1][MODEL].scores:
            raise UserError(f"clip {index}: expected truth for something that {observe!r} leaves open, got none")
        if progress is not None:
            progress(index + 1, total)
    if not outcomes:
        raise UserError("scenes: expected at least one clip, got none")
    settings = {"observe": observe, "steps": steps, "guidance": guidance, "candidates": candidates, "seed": seed}
    settings["trivial rows fitted on"] = f"{priors.clips} training clips" if priors else "nothing (no priors given)"
    names = dict.fromkeys(name for clip in outcomes for name, outcome in clip.items() if outcome.scores)
    rows = tuple(_row(name, [clip.get(name, Outcome()) for clip in outcomes]) for name in names)
    alignments = {"depth": ALIGNMENT_TEXT[alignment], "pose": POSE_ALIGNMENT_TEXT}
    return EvaluationReport("held-out clips", settings, alignments, rows, len(outcomes), seconds / len(outcomes))


def only_observed(scene: Scene, observation: Observation) -> Scene:
    """The scene without anything that the observation does not give; the caption stays, scale and report go.

    Unobserved frames of an observed modality become grey images, empty depth, and copies of the first observed camera.
    The images are always there, grey if need be, since they carry the clip's length and size.
    """
    height, width = scene.image_size
    rgb = torch.full((scene.num_frames, 3, height, width), GREY)
    if scene.rgb is not None:
        rgb = torch.where(observation.rgb[:, None, None, None], scene.rgb, rgb)
    depth = None
    if scene.depth is not None and bool(observation.depth.any()):
        depth = scene.depth * observation.depth[:, None, None]
    intrinsics, cam_to_world = None, None
    if scene.intrinsics is not None and scene.cam_to_world is not None and bool(observation.camera.any()):
        source = torch.where(observation.camera, torch.arange(scene.num_frames), observation.camera.int().argmax())
        intrinsics, cam_to_world = scene.intrinsics[source], scene.cam_to_world[source]
    return replace(scene, rgb=rgb, depth=depth, intrinsics=intrinsics, cam_to_world=cam_to_world, scale=None, report={})


def score(
    prediction: Prediction, truth: Scene, observation: Observation, *, alignment: DepthAlignment
) -> dict[str, float]:
    """All metrics of one clip that both the prediction and the truth allow, over what was not observed.

    Depth, focal length and images are compared on unobserved frames; the camera path as a whole, unless all was given.
    """
    values: dict[str, float] = {}
    open_depth, open_camera, open_rgb = ~observation.depth, ~observation.camera, ~observation.rgb
    if truth.depth is not None and prediction.depth is not None and bool(valid_depth(truth.depth[open_depth]).any()):
        result = depth_metrics(prediction.depth[open_depth], truth.depth[open_depth], alignment=alignment)
        values |= {name: result[name] for name in ("abs_rel", "rmse", "delta_1_25")}
    if truth.cam_to_world is not None and prediction.cam_to_world is not None and bool(open_camera.any()):
        min_motion = 1e-6 if truth.depth is None else MIN_MOTION_IN_SCALES * clip_scale(truth.depth)
        values |= pose_metrics(prediction.cam_to_world, truth.cam_to_world, min_motion=min_motion)
    if truth.intrinsics is not None and prediction.intrinsics is not None and bool(open_camera.any()):
        values["focal_error"] = focal_error(prediction.intrinsics[open_camera], truth.intrinsics[open_camera])
    if truth.rgb is not None and prediction.rgb is not None and bool(open_rgb.any()):
        values["psnr"] = psnr(prediction.rgb[open_rgb], truth.rgb[open_rgb])
        if min(truth.image_size) >= 11:
            values["ssim"] = ssim(prediction.rgb[open_rgb], truth.rgb[open_rgb])
    return values


def _as_prediction(completed: Scene, truth: Scene) -> Prediction:
    """The pipeline's scene at the truth's size, on the CPU."""
    if completed.num_frames != truth.num_frames:
        raise UserError(f"prediction: expected {truth.num_frames} frames like the clip, got {completed.num_frames}")

    def local(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().cpu()

    scene = replace(
        completed,
        rgb=local(completed.rgb),
        depth=local(completed.depth),
        intrinsics=local(completed.intrinsics),
        cam_to_world=local(completed.cam_to_world),
    )
    if scene.rgb is not None or scene.depth is not None:
        scene = scene.resized(truth.image_size)
    scale = math.nan if scene.depth is None else clip_scale(scene.depth)
    return Prediction(scene.rgb, scene.depth, scene.intrinsics, scene.cam_to_world, scale)


def _trivial_answers(truth: Scene, observation: Observation, priors: TrivialPriors | None) -> dict[str, Prediction]:
    """Predictors that know the training set, the clip's length and (for the blend) the observed images, and no more."""
    frames, size = truth.num_frames, truth.image_size
    answers = {
        "constant depth": Prediction(depth=constant_depth(frames, size)),
        "static camera": Prediction(cam_to_world=static_camera(frames), scale=1.0),
    }
    if priors is not None:
        intrinsics = mean_intrinsics(priors, frames, size)
        answers = {
            "mean depth map": Prediction(depth=mean_depth(priors, frames, size)),
            **answers,
            "straight line": Prediction(cam_to_world=straight_line(priors, frames), scale=1.0),
            "mean motion": Prediction(cam_to_world=mean_motion(priors, frames), intrinsics=intrinsics, scale=1.0),
        }
    if truth.rgb is not None and bool(observation.rgb.any()) and not bool(observation.rgb.all()):
        answers["frame blend"] = Prediction(rgb=blend_frames(truth.rgb, observation.rgb.nonzero()[:, 0].tolist()))
    return answers


def _outcome(prediction: Prediction, truth: Scene, observation: Observation, alignment: DepthAlignment) -> Outcome:
    scores = score(prediction, truth, observation, alignment=alignment)
    if prediction.cam_to_world is None or truth.cam_to_world is None or bool(observation.camera[-1]):
        return Outcome(scores)
    scale = math.nan if truth.depth is None else clip_scale(truth.depth)
    pair = (
        motion_components(prediction.cam_to_world, prediction.scale),
        motion_components(truth.cam_to_world, scale),
    )
    return Outcome(scores, pair)


def _row(name: str, outcomes: Sequence[Outcome]) -> Row:
    metrics = dict.fromkeys(metric for outcome in outcomes for metric in outcome.scores)
    values = {metric: tuple(outcome.scores.get(metric, math.nan) for outcome in outcomes) for metric in metrics}
    pairs = [outcome.motion for outcome in outcomes if outcome.motion is not None]
    correlations = component_correlations([p for p, _ in pairs], [t for _, t in pairs]) if pairs else {}
    return Row(name, name != MODEL, values, correlations)


def _count(scenes: Iterable[Scene], clips: int | None) -> int | None:
    if clips is not None and clips < 1:
        raise UserError(f"clips: expected at least 1, got {clips}")
    known = len(scenes) if isinstance(scenes, Sized) else None
    return min(filter(None, (known, clips)), default=known)
