"""Pose errors: zero for the truth in any frame and unit, known angles, and the same numbers as evo."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from camera_paths import matched, poses, random_walk, read_tum, similar
from scipy.spatial.transform import Rotation

from u4d.errors import UserError
from u4d.evaluate.pose_metrics import (
    COMPONENTS,
    component_correlations,
    focal_error,
    motion_components,
    pose_metrics,
)
from u4d.geometry.cameras import fov_to_intrinsics


def test_truth_in_another_frame_and_unit_has_no_error() -> None:
    truth = random_walk(12, 0)
    for value in pose_metrics(similar(truth, 1, 0.03), truth).values():
        assert value == pytest.approx(0, abs=1e-6)


def test_errors_do_not_depend_on_the_predictions_frame_and_unit() -> None:
    truth, prediction = random_walk(12, 0), random_walk(12, 1)
    base = pose_metrics(prediction, truth)
    assert pose_metrics(similar(prediction, 2, 50.0), truth) == pytest.approx(base)
    assert min(base.values()) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_evos(seed: int) -> None:
    metrics = pytest.importorskip("evo.core.metrics", reason="evo (a test-only oracle) is not installed")
    from evo.core.trajectory import PosePath3D

    truth, prediction = random_walk(15, seed), random_walk(15, seed + 100)
    reference = PosePath3D(poses_se3=list(truth.numpy()))
    estimate = PosePath3D(poses_se3=list(prediction.numpy()))
    estimate.align(reference, correct_scale=True)
    ours = pose_metrics(prediction, truth)
    relations = {
        "ate": metrics.APE(metrics.PoseRelation.translation_part),
        "rpe_t": metrics.RPE(metrics.PoseRelation.translation_part, delta=1, delta_unit=metrics.Unit.frames),
        "rpe_r_deg": metrics.RPE(metrics.PoseRelation.rotation_angle_deg, delta=1, delta_unit=metrics.Unit.frames),
    }
    for name, metric in relations.items():
        metric.process_data((reference, estimate))
        assert ours[name] == pytest.approx(metric.get_statistic(metrics.StatisticsType.rmse), rel=1e-7), name
    assert ours["ate_over_path"] == pytest.approx(ours["ate"] / reference.path_length)


@pytest.mark.parametrize(
    ("estimate", "truth", "ate", "rpe_t", "rpe_r_deg"),
    [
        ("freiburg1_xyz-rgbdslam", "freiburg1_xyz-groundtruth", 0.013389, 0.005806, 0.353613),
        ("freiburg1_xyz-ORB_kf_mono", "freiburg1_xyz-groundtruth", 0.009755, 0.013835, 0.884849),
        ("fr2_desk_ORB_kf_mono", "fr2_desk_groundtruth", 0.007729, 0.007069, 0.387091),
        ("fr2_desk_ORB", "fr2_desk_groundtruth", 0.006123, 0.003485, 0.280519),
    ],
)
def test_golden_numbers_of_real_trajectories(
    shared_data: Path, estimate: str, truth: str, ate: float, rpe_t: float, rpe_r_deg: float
) -> None:
    times, path = read_tum(shared_data / "trajectories" / f"{estimate}.txt")
    true_times, true_path = read_tum(shared_data / "trajectories" / f"{truth}.txt")
    true_index, index = matched(true_times, times)
    ours = pose_metrics(path[index], true_path[true_index])
    # The golden file's numbers carry six decimals.
    assert ours["ate"] == pytest.approx(ate, abs=1e-6)
    assert ours["rpe_t"] == pytest.approx(rpe_t, abs=1e-6)
    assert ours["rpe_r_deg"] == pytest.approx(rpe_r_deg, abs=1e-6)


def line(direction: tuple[float, float, float], num_frames: int = 6) -> torch.Tensor:
    steps = np.arange(num_frames)[:, None] * np.array(direction)
    return poses(np.eye(3), steps)


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 135.0, 180.0])
def test_translation_direction_is_the_angle_between_the_lines(angle: float) -> None:
    turned = (math.sin(math.radians(angle)), 0.0, math.cos(math.radians(angle)))
    metrics = pose_metrics(line(turned), line((0, 0, 2)))
    assert metrics["translation_direction_deg"] == pytest.approx(angle, abs=1e-6)
    assert metrics["ate"] == pytest.approx(0, abs=1e-9)  # the reason for this metric: Sim(3) forgives every line


def test_translation_direction_is_seen_from_the_first_camera() -> None:
    truth = line((0, 0, 1))
    looking_sideways = truth.clone()
    looking_sideways[:, :3, :3] = torch.from_numpy(Rotation.from_euler("y", 90, degrees=True).as_matrix())
    assert pose_metrics(looking_sideways, truth)["translation_direction_deg"] == pytest.approx(90)


def test_chance_is_ninety_degrees() -> None:
    still = line((0, 0, 0))
    assert pose_metrics(still, line((0, 1, 1)))["translation_direction_deg"] == 90.0
    directions = np.random.default_rng(0).standard_normal((400, 3))
    angles = [pose_metrics(line(tuple(d), 2), line((0, 0, 1), 2))["translation_direction_deg"] for d in directions]
    assert np.median(angles) == pytest.approx(90, abs=8)


def test_frames_that_hardly_move_have_no_direction() -> None:
    truth = line((0, 0, 1), 12)
    truth[1:9, :3, 3] *= 0.01
    prediction = truth.clone()
    prediction[1:9, :3, 3] *= -1  # wrong, but there the truth says nothing
    assert pose_metrics(prediction, truth)["translation_direction_deg"] == pytest.approx(0, abs=1e-6)
    assert math.isnan(pose_metrics(prediction, truth, min_motion=100.0)["translation_direction_deg"])
    rotating_only = pose_metrics(prediction, line((0, 0, 0), 12))
    assert math.isnan(rotating_only["translation_direction_deg"])
    assert math.isnan(rotating_only["ate_over_path"])


def test_rotation_errors_are_known_angles() -> None:
    truth = line((0, 0, 1), 7)
    prediction = truth.clone()
    turns = Rotation.from_rotvec(np.outer(3.0 * np.arange(7), [1, 0, 0]), degrees=True)
    prediction[:, :3, :3] = torch.from_numpy(turns.as_matrix())
    metrics = pose_metrics(prediction, truth)
    assert metrics["rotation_first_to_last_deg"] == pytest.approx(18)
    assert metrics["rpe_r_deg"] == pytest.approx(3)


def test_a_still_prediction_costs_what_the_truth_moves() -> None:
    truth = random_walk(9, 3)
    metrics = pose_metrics(poses(np.eye(3), np.zeros((9, 3))), truth)
    centres = truth[:, :3, 3].numpy()
    assert metrics["ate"] == pytest.approx(float(np.sqrt(((centres - centres.mean(0)) ** 2).sum(1).mean())))
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    assert metrics["rpe_t"] == pytest.approx(float(np.sqrt((steps**2).mean())))


def test_one_frame_defines_nothing() -> None:
    assert all(math.isnan(value) for value in pose_metrics(random_walk(1, 0), random_walk(1, 1)).values())


def test_bad_poses_are_named() -> None:
    truth = random_walk(4, 0)
    broken = truth.clone()
    broken[2, 0, 0] = math.nan
    with pytest.raises(UserError, match=r"prediction: .* in frame 2"):
        pose_metrics(broken, truth)
    with pytest.raises(UserError, match=r"\[4, 4, 4\], got \[3, 4, 4\]"):
        pose_metrics(truth[:3], truth)


def test_focal_error_is_relative() -> None:
    truth = fov_to_intrinsics(torch.full((3,), 1.0), (48, 64))
    prediction = truth.clone()
    prediction[:, 0, 0] *= 1.1
    prediction[:, 1, 1] *= 0.8
    assert focal_error(prediction, truth) == pytest.approx(0.15, rel=1e-5)
    assert focal_error(truth, truth) == 0.0


def test_motion_components_are_turns_about_and_steps_along_the_axes() -> None:
    path = line((0.5, -1, 2), 5)
    rotvec = np.deg2rad([10.0, -20.0, 5.0])
    path[-1, :3, :3] = torch.from_numpy(Rotation.from_rotvec(rotvec).as_matrix())
    expected = [10.0, -20.0, 5.0, 1.0, -2.0, 4.0]
    assert motion_components(path, 2.0).tolist() == pytest.approx(expected)
    assert motion_components(similar(path, 7, 3.0), 6.0).tolist() == pytest.approx(expected)
    assert motion_components(line((0, 0, 0), 3), 1.0).tolist() == [0.0] * 6


def test_component_correlation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((30, 6))
    prediction = 0.5 * truth + rng.standard_normal((30, 6))
    prediction[:, 2] = 4.0
    result = component_correlations(list(torch.from_numpy(prediction)), list(torch.from_numpy(truth)))
    assert list(result) == list(COMPONENTS)
    assert math.isnan(result["roll"])
    for index, name in enumerate(COMPONENTS):
        if name != "roll":
            assert result[name] == pytest.approx(np.corrcoef(prediction[:, index], truth[:, index])[0, 1])
    assert math.isnan(component_correlations([torch.zeros(6)] * 2, [torch.ones(6)] * 2)["tx"])
    with pytest.raises(UserError, match="one per truth"):
        component_correlations([torch.zeros(6)], [])
