"""Evaluation with pipelines whose answers are known: the truth, the truth disturbed, and what they were given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from camera_paths import random_walk, similar

from u4d.errors import UserError
from u4d.evaluate.results import EvaluationReport
from u4d.evaluate.run import GREY, evaluate, only_observed
from u4d.evaluate.trivial import fit_priors
from u4d.geometry.cameras import fov_to_intrinsics
from u4d.sample.observation import parse_observation
from u4d.scene import Scene

FRAMES, SIZE = 6, (16, 24)


def clip(seed: int) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    return Scene(
        rgb=torch.rand(FRAMES, 3, *SIZE, generator=generator),
        depth=torch.rand(FRAMES, *SIZE, generator=generator) + 1,
        intrinsics=fov_to_intrinsics(torch.full((FRAMES,), 0.5 + 0.1 * seed), SIZE),
        cam_to_world=random_walk(FRAMES, seed).float(),
        caption=f"clip {seed}",
        scale=3.0,
        report={"secret": "truth"},
    )


CLIPS = [clip(seed) for seed in range(4)]


@dataclass
class FakePipe:
    """Answers with the truth, disturbed; remembers what it was given."""

    disturb: Callable[[Scene], Scene] = lambda scene: scene
    given: list[Scene] = field(default_factory=list)
    options: list[dict[str, object]] = field(default_factory=list)

    def complete(self, scene: Scene, *, observe: str, steps: int, guidance: float, candidates: int, seed: int) -> Scene:
        self.options.append(
            {"observe": observe, "steps": steps, "guidance": guidance, "candidates": candidates, "seed": seed}
        )
        self.given.append(scene)
        return self.disturb(next(truth for truth in CLIPS if truth.caption == scene.caption))


def mean(report: EvaluationReport, row: str, metric: str) -> float:
    return report.row(row).summary(metric).mean


def test_the_truth_scores_perfectly_in_any_unit_and_world_frame() -> None:
    def other_unit(scene: Scene) -> Scene:
        path = similar(scene.cam_to_world.double(), 5, 0.25).float()
        return replace(scene, depth=scene.depth * 0.25, cam_to_world=path)

    report = evaluate(FakePipe(other_unit), CLIPS, priors=fit_priors(CLIPS))
    for metric in ("abs_rel", "rmse", "ate", "rpe_t", "rpe_r_deg", "focal_error", "ate_over_path"):
        assert mean(report, "model", metric) == pytest.approx(0, abs=1e-3), metric
    for metric in ("rotation_first_to_last_deg", "translation_direction_deg"):
        assert mean(report, "model", metric) == pytest.approx(0, abs=1e-2), metric
    assert mean(report, "model", "delta_1_25") == 1.0
    assert all(r == pytest.approx(1, abs=1e-4) for r in report.row("model").correlations.values())
    assert "psnr" not in report.metrics  # every image was observed


def test_disturbances_are_measured_where_they_are() -> None:
    def disturbed(scene: Scene) -> Scene:
        intrinsics = scene.intrinsics.clone()
        intrinsics[:, :2, :2] *= 1.2
        depth = scene.depth.clone()
        depth[:, : SIZE[0] // 4] *= 1.5
        return replace(scene, intrinsics=intrinsics, depth=depth)

    report = evaluate(FakePipe(disturbed), CLIPS, alignment="none")
    assert mean(report, "model", "focal_error") == pytest.approx(0.2, rel=1e-4)
    assert mean(report, "model", "abs_rel") == pytest.approx(0.5 / 4, rel=1e-4)
    assert mean(report, "model", "delta_1_25") == pytest.approx(0.75)
    assert mean(report, "model", "ate") == pytest.approx(0, abs=1e-3)
    assert report.alignments["depth"].startswith("none")


def test_the_pipe_sees_nothing_that_is_not_observed() -> None:
    pipe = FakePipe()
    evaluate(pipe, CLIPS, clips=1)
    given = pipe.given[0]
    assert given.depth is None and given.intrinsics is None and given.cam_to_world is None
    assert given.scale is None and given.report == {}
    assert torch.equal(given.rgb, CLIPS[0].rgb)


@pytest.mark.parametrize("observe", ["rgb:0,-1", "camera:all,rgb:0", "depth:0", "rgb:0,depth:0,camera:2", "none"])
def test_changing_what_is_unobserved_changes_nothing_that_is_given(observe: str) -> None:
    observation = parse_observation(observe, FRAMES)
    truth, other = CLIPS[0], CLIPS[1]
    mixed = Scene(
        rgb=torch.where(observation.rgb[:, None, None, None], truth.rgb, other.rgb),
        depth=torch.where(observation.depth[:, None, None], truth.depth, other.depth),
        intrinsics=torch.where(observation.camera[:, None, None], truth.intrinsics, other.intrinsics),
        cam_to_world=torch.where(observation.camera[:, None, None], truth.cam_to_world, other.cam_to_world),
        caption=truth.caption,
    )
    a, b = only_observed(truth, observation), only_observed(mixed, observation)
    for name in ("rgb", "depth", "intrinsics", "cam_to_world"):
        first, second = getattr(a, name), getattr(b, name)
        assert (first is None and second is None) or torch.equal(first, second), name
        seen = getattr(observation, "camera" if name in ("intrinsics", "cam_to_world") else name)
        assert first is None or torch.equal(first[seen], getattr(truth, name)[seen])
    assert a.num_frames == FRAMES
    assert a.image_size == SIZE


def test_only_unobserved_frames_are_scored() -> None:
    def good_where_observed(scene: Scene) -> Scene:
        rgb = torch.full_like(scene.rgb, GREY)
        rgb[[0, -1]] = scene.rgb[[0, -1]]
        depth = scene.depth.clone()
        depth[0] *= 100
        return replace(scene, rgb=rgb, depth=depth)

    report = evaluate(FakePipe(good_where_observed), CLIPS, observe="rgb:0,-1,depth:0", alignment="none")
    # Uniform colours have variance 1/12 about grey; were the two perfect frames counted, the mean would be far above.
    assert mean(report, "model", "psnr") == pytest.approx(10 * math.log10(12), abs=0.2)
    assert mean(report, "model", "abs_rel") == pytest.approx(0, abs=1e-9)
    assert mean(report, "frame blend", "psnr") > mean(report, "model", "psnr") - 5
    given_path = evaluate(FakePipe(), CLIPS, observe="camera:all,rgb:0,-1")
    assert not {"ate", "focal_error", "rpe_t"} & set(given_path.metrics)
    assert [row.name for row in given_path.rows] == ["model", "constant depth", "frame blend"]


def test_trivial_rows_stand_beside_the_model() -> None:
    report = evaluate(FakePipe(), CLIPS, priors=fit_priors(CLIPS), observe="rgb:0,-1")
    names = [
        "model",
        "mean depth map",
        "constant depth",
        "static camera",
        "straight line",
        "mean motion",
        "frame blend",
    ]
    assert [row.name for row in report.rows] == names
    assert [row.trivial for row in report.rows] == [False] + [True] * 6
    assert mean(report, "static camera", "translation_direction_deg") == 90.0
    assert 0.05 < mean(report, "constant depth", "abs_rel") < 0.5
    assert mean(report, "mean motion", "focal_error") > 0
    assert all(math.isnan(r) for r in report.row("mean motion").correlations.values())
    assert [row.name for row in evaluate(FakePipe(), CLIPS).rows] == ["model", "constant depth", "static camera"]


def test_options_reach_the_pipe_and_the_report() -> None:
    pipe, calls = FakePipe(), []
    report = evaluate(
        pipe,
        CLIPS,
        steps=7,
        guidance=1.5,
        candidates=3,
        clips=2,
        seed=40,
        progress=lambda done, total: calls.append((done, total)),
    )
    expected = {"observe": "rgb:all", "steps": 7, "guidance": 1.5, "candidates": 3}
    assert pipe.options == [{**expected, "seed": 40}, {**expected, "seed": 41}]
    assert expected.items() <= report.settings.items()
    assert calls == [(1, 2), (2, 2)]
    assert report.clips == 2
    calls.clear()
    evaluate(FakePipe(), iter(CLIPS), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4, None)


def test_predictions_at_another_size_are_compared_at_the_truths() -> None:
    report = evaluate(FakePipe(lambda scene: scene.resized((32, 48))), CLIPS, observe="rgb:0")
    assert mean(report, "model", "focal_error") == pytest.approx(0, abs=1e-6)
    assert mean(report, "model", "abs_rel") == pytest.approx(0, abs=1e-6)
    assert mean(report, "model", "psnr") > 12


def test_what_a_clip_does_not_know_is_counted_and_not_scored() -> None:
    def truth_only_partly(scene: Scene) -> Scene:
        return next(full for full in (clip(0), clip(1)) if full.caption == scene.caption)

    partly = [CLIPS[0], replace(CLIPS[1], depth=None)]
    report = evaluate(FakePipe(truth_only_partly), partly)
    assert report.row("model").summary("abs_rel").count == 1
    assert report.row("model").summary("ate").count == 2
    assert report.row("model").values["abs_rel"][0] == pytest.approx(0, abs=1e-9)
    assert math.isnan(report.row("model").values["abs_rel"][1])


def test_bad_runs_name_the_clip() -> None:
    def not_finite(scene: Scene) -> Scene:
        answer = replace(scene)
        if scene.caption == "clip 2":
            object.__setattr__(answer, "rgb", scene.rgb * math.nan)
        return answer

    with pytest.raises(UserError, match=r"^clip 2: .*finite|^clip 2: rgb"):
        evaluate(FakePipe(not_finite), CLIPS, observe="rgb:0")
    with pytest.raises(UserError, match=r"^clip 0: .*'rgb:77'"):
        evaluate(FakePipe(), CLIPS, observe="rgb:77")
    with pytest.raises(UserError, match=r"^clip 0: prediction: expected 6 frames like the clip, got 3"):
        evaluate(FakePipe(lambda scene: scene.frames(range(3))), CLIPS)
    with pytest.raises(UserError, match="at least one clip"):
        evaluate(FakePipe(), [])
    with pytest.raises(UserError, match="clips: expected at least 1"):
        evaluate(FakePipe(), CLIPS, clips=0)
    with pytest.raises(UserError, match=r"^clip 0: expected truth for something that 'rgb:all' leaves open"):
        evaluate(FakePipe(), [Scene(rgb=CLIPS[0].rgb, caption="clip 0")])
