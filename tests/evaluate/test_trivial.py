"""Trivial predictors: averages of training clips that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from u4d.errors import UserError
from u4d.evaluate.trivial import (
    blend_frames,
    constant_depth,
    fit_priors,
    mean_depth,
    mean_intrinsics,
    mean_motion,
    static_camera,
    straight_line,
)
from u4d.geometry.cameras import check_intrinsics, check_rigid
from u4d.geometry.depth import clip_scale
from u4d.scene import Scene


def turning_clip(degrees: float, forward: float, depth: float, focal: float, num_frames: int = 5) -> Scene:
    """A clip of constant depth whose camera turns about y and moves ahead, evenly; H, W = 6, 8."""
    poses = torch.eye(4).repeat(num_frames, 1, 1)
    part = np.linspace(0, 1, num_frames)
    turns = Rotation.from_rotvec(np.outer(part * degrees, [0, 1, 0]), degrees=True).as_matrix()
    poses[:, :3, :3] = torch.from_numpy(turns).float()
    poses[:, 2, 3] = torch.from_numpy(part * forward).float()
    intrinsics = torch.tensor([[focal, 0, 4], [0, focal, 3], [0, 0, 1.0]]).repeat(num_frames, 1, 1)
    return Scene(depth=torch.full((num_frames, 6, 8), depth), intrinsics=intrinsics, cam_to_world=poses)


def test_mean_motion_averages_turns_and_steps_in_scales() -> None:
    priors = fit_priors([turning_clip(10, 4.0, depth=2.0, focal=8), turning_clip(20, 20.0, depth=5.0, focal=2)])
    path = mean_motion(priors, 5)
    check_rigid(path)
    expected = Rotation.from_euler("y", 15, degrees=True).as_matrix()
    assert np.allclose(path[-1, :3, :3].numpy(), expected, atol=1e-4)
    assert path[-1, :3, 3].tolist() == pytest.approx([0, 0, (4 / 2 + 20 / 5) / 2])
    assert torch.equal(path[0], torch.eye(4))
    assert priors.speed == pytest.approx(3 / 4)
    assert mean_intrinsics(priors, 1, (6, 8))[0, 0, 0] == pytest.approx(math.sqrt(8 * 2))
    assert priors.clips == 2


def test_mean_motion_is_stretched_over_clips_of_other_lengths() -> None:
    priors = fit_priors([turning_clip(40, 8.0, depth=1.0, focal=8)])
    for num_frames in (1, 2, 9, 50):
        path = mean_motion(priors, num_frames)
        check_rigid(path)
        truth = turning_clip(40, 8.0, depth=1.0, focal=8, num_frames=num_frames).cam_to_world
        assert torch.allclose(path, truth, atol=1e-3), num_frames


def test_straight_line_has_the_mean_direction_and_speed() -> None:
    priors = fit_priors([turning_clip(30, 4.0, depth=1.0, focal=8), turning_clip(-30, 8.0, depth=1.0, focal=8)])
    line = straight_line(priors, 7)
    assert torch.equal(line[:, :3, :3], torch.eye(3).expand(7, 3, 3))
    assert line[:, :3, 3].tolist() == [[0, 0, pytest.approx(1.5 * n)] for n in range(7)]
    still = fit_priors([turning_clip(30, 0.0, depth=1.0, focal=8)])
    assert torch.equal(straight_line(still, 3), static_camera(3))


def test_mean_depth_is_the_mean_in_the_channel_whatever_the_unit() -> None:
    near, far = turning_clip(0, 1, depth=1.0, focal=8), turning_clip(0, 1, depth=1.0, focal=8)
    for clip, factor in ((near, 1.0), (far, 100.0)):
        clip.depth[:, 0] = 3.0
        clip.depth[:, 1, 0] = 0.0
        clip.depth.mul_(factor)
    near.depth[:, 0] = 0.0
    assert clip_scale(near.depth) == 1.0
    assert clip_scale(far.depth) == 100.0
    depth = mean_depth(fit_priors([near, far]), 4, (6, 8))
    assert depth.shape == (4, 6, 8)
    assert depth[:, 3].unique().tolist() == [pytest.approx(1.0)]
    assert depth[2, 0, 3] == pytest.approx(3.0)  # where the near clip says nothing the far one is asked alone
    assert depth[2, 1, 0] == pytest.approx(3.0)  # never valid: the map's farthest
    far.depth[:, 0] = 700.0
    near.depth[:, 0] = 1.0  # channel 0 and -3/4: mean -3/8, which is depth 11/5
    assert mean_depth(fit_priors([near, far]), 1, (6, 8))[0, 0, 3] == pytest.approx(11 / 5, rel=1e-5)


def test_predictions_follow_the_image_size() -> None:
    priors = fit_priors([turning_clip(0, 1, depth=2.0, focal=8)])
    assert mean_depth(priors, 2, (12, 20)).shape == (2, 12, 20)
    assert constant_depth(2, (12, 20)).shape == (2, 12, 20)
    intrinsics = mean_intrinsics(priors, 3, (12, 20))
    check_intrinsics(intrinsics)
    assert intrinsics[2].tolist() == [[20, 0, 10], [0, 20, 6], [0, 0, 1]]


def test_frames_are_blended_in_time_between_observed_ones() -> None:
    rgb = torch.rand(6, 3, 2, 2)
    blended = blend_frames(rgb, [4, 1])
    assert torch.equal(blended[1], rgb[1])
    assert torch.equal(blended[4], rgb[4])
    torch.testing.assert_close(blended[2], (2 * rgb[1] + rgb[4]) / 3)
    assert torch.equal(blended[0], rgb[1])
    assert torch.equal(blended[5], rgb[4])
    with pytest.raises(UserError, match="at least one frame"):
        blend_frames(rgb, [])


def test_unfit_training_clips_are_named() -> None:
    clip = turning_clip(0, 1, depth=2.0, focal=8)
    with pytest.raises(UserError, match="at least one training clip"):
        fit_priors([])
    with pytest.raises(UserError, match="clip 1 has not all"):
        fit_priors([clip, Scene(depth=clip.depth)])
    with pytest.raises(UserError, match=r"clip 1 is \[3, 6, 8\]"):
        fit_priors([clip, clip.frames(range(3))])
