"""The depth channel is exactly invertible, and the scale follows the rule of the spec whatever the depth contains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from u4d.errors import UserError
from u4d.geometry.depth import channel_to_depth, clip_scale, depth_to_channel, fill_invalid, valid_depth


@settings(deadline=None, max_examples=100)
@given(st.floats(1e-3, 1e3), st.floats(1e-2, 1e2))
def test_channel_returns_the_depth(depth_in_scales: float, scale: float) -> None:
    depth = torch.full((1, 1, 1), depth_in_scales * scale, dtype=torch.float64)
    channel = depth_to_channel(depth, scale)
    assert -1 < float(channel) < 1
    torch.testing.assert_close(channel_to_depth(channel, scale), depth, rtol=1e-12, atol=0)


def test_landmarks_of_the_channel() -> None:
    depth = torch.tensor([[[3.0, 1.0, 9.0, math.inf]]])
    assert depth_to_channel(depth, 3.0).flatten().tolist() == pytest.approx([0.0, 0.5, -0.5, -1.0])


def test_scale_may_differ_per_clip() -> None:
    depth = torch.rand(2, 3, 4, 5) + 0.1
    scale = torch.tensor([0.5, 4.0])
    channel = depth_to_channel(depth, scale)
    torch.testing.assert_close(channel[1], depth_to_channel(depth[1], 4.0))
    torch.testing.assert_close(channel_to_depth(channel, scale), depth)


def test_overshooting_channels_give_positive_finite_depth() -> None:
    depth = channel_to_depth(torch.tensor([[[-3.0, -1.0, 1.0, 3.0]]]), 2.0)
    assert torch.isfinite(depth).all()
    assert (depth > 0).all()
    assert float(depth[0, 0, 0]) > 1e4
    assert float(depth[0, 0, 3]) < 1e-4


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scales_that_destroy_depth_are_refused(scale: float) -> None:
    with pytest.raises(UserError, match="scale: expected"):
        depth_to_channel(torch.ones(1, 1, 1), scale)
    with pytest.raises(UserError, match="scale: expected"):
        channel_to_depth(torch.zeros(2, 1, 1, 1), torch.tensor([1.0, scale]))


def test_scales_that_match_no_clip_are_refused() -> None:
    with pytest.raises(UserError, match=r"\[2, 3, 4, 5\], got \[3\]"):
        depth_to_channel(torch.ones(2, 3, 4, 5), torch.ones(3))


def test_invalid_pixels_become_the_farthest_of_their_own_clip() -> None:
    depth = torch.tensor([[[[1.0, 0.0], [7.0, math.nan]]], [[[2.0, math.inf], [3.0, -1.0]]]])
    filled = fill_invalid(depth)
    assert filled.flatten().tolist() == [1.0, 7.0, 7.0, 7.0, 2.0, 3.0, 3.0, 3.0]
    assert valid_depth(depth).flatten().tolist() == [True, False, True, False, True, False, True, False]


def test_a_clip_without_depth_cannot_be_filled() -> None:
    with pytest.raises(UserError, match="at least one valid pixel"):
        fill_invalid(torch.stack([torch.ones(2, 3, 3), torch.zeros(2, 3, 3)]))
    with pytest.raises(UserError, match="expected"):
        fill_invalid(torch.ones(3, 3))


def cameras(*centres: tuple[float, float, float]) -> torch.Tensor:
    poses = torch.eye(4).repeat(len(centres), 1, 1)
    poses[:, :3, 3] = torch.tensor(centres)
    return poses


def test_scale_rule() -> None:
    path = cameras((10, 0, 0), (10, 3, 4), (11, 0, 0))
    noise = np.random.default_rng(0).uniform(1, 5, (2, 6, 7)).astype(np.float32)
    assert clip_scale(torch.from_numpy(noise)) == pytest.approx(float(np.median(noise)), rel=1e-6)
    odd = noise.reshape(-1)[:41]
    assert clip_scale(torch.from_numpy(odd.copy()), path) == pytest.approx(float(np.median(odd)), rel=1e-6)
    assert clip_scale(cam_to_world=path) == pytest.approx(5.0)
    assert clip_scale() == 1.0


def test_scale_passes_over_invalid_depth() -> None:
    depth = torch.tensor([0.0, -3.0, math.nan, math.inf, 2.0, 4.0, 6.0])
    assert clip_scale(depth) == 4.0


def test_scale_falls_back_step_by_step() -> None:
    nothing = torch.tensor([0.0, math.nan, math.inf])
    assert clip_scale(nothing, cameras((0, 0, 0), (0, 2, 0))) == 2.0
    assert clip_scale(nothing, cameras((5, 5, 5), (5, 5, 5))) == 1.0
    assert clip_scale(nothing, cameras((5, 5, 5))) == 1.0
    assert clip_scale(torch.zeros(0), torch.zeros(0, 4, 4)) == 1.0


def test_scale_refuses_cameras_that_are_none() -> None:
    with pytest.raises(UserError, match="finite camera centres"):
        clip_scale(cam_to_world=cameras((0, 0, 0), (math.nan, 0, 0)))
    with pytest.raises(UserError, match=r"\[N, 4, 4\]"):
        clip_scale(cam_to_world=torch.eye(4))


def test_scaling_a_clip_leaves_its_channel_alone() -> None:
    depth = torch.rand(3, 4, 5, dtype=torch.float64) + 0.5
    small = depth_to_channel(depth, clip_scale(depth))
    large = depth_to_channel(1000 * depth, clip_scale(1000 * depth))
    torch.testing.assert_close(small, large)
