"""Clips to streams and back, and the scale that a sample's context gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_clips import SIZE, assert_same_cameras, random_clips, with_holes
from torch import Tensor

from u4d.clips import Clips
from u4d.errors import UserError
from u4d.model.streams import decoded_depth, observed_scale, to_clips, to_streams
from u4d_fast.time_layout import frame_groups

RGB, DEPTH, RAY_DIR, RAY_MOMENT = range(4)


@pytest.mark.parametrize("frames", (1, 2, 4, 10))
def test_streams_hold_everything_of_a_clip(frames: int) -> None:
    clips, scale = random_clips(frames), torch.tensor([0.7, 3.0])
    back, residual = to_clips(to_streams(clips, scale, SIZE), frames, scale)
    torch.testing.assert_close(back.rgb, clips.rgb)
    torch.testing.assert_close(back.depth, clips.depth, rtol=1e-4, atol=0)
    assert_same_cameras(back, clips)
    assert residual.shape == (2, frames)
    assert residual.max() < 1e-4


def test_lenses_that_change_come_back_when_they_are_not_shared() -> None:
    clips, scale = random_clips(4, batch=1), torch.ones(1)
    zoom = torch.tensor([1.0, 1.1, 1.3, 0.8])[None, :, None, None]
    intrinsics = torch.cat((clips.intrinsics[..., :2] * zoom, clips.intrinsics[..., 2:]), dim=-1)
    intrinsics[..., 2, 2] = 1
    zoomed = replace(clips, intrinsics=intrinsics)
    back, _ = to_clips(to_streams(zoomed, scale, SIZE), 4, scale, shared_intrinsics=False)
    assert_same_cameras(back, zoomed)


def test_the_unit_of_length_does_not_matter() -> None:
    """A clip in feet, divided by its scale in feet, makes the same streams."""
    metres = to_streams(random_clips(6), torch.tensor([2.0, 0.5]), SIZE)
    feet = to_streams(random_clips(6, unit=3.28), 3.28 * torch.tensor([2.0, 0.5]), SIZE)
    for name, stream in vars(metres).items():
        torch.testing.assert_close(getattr(feet, name), stream, rtol=1e-4, atol=1e-5)


def test_shapes_and_ranges() -> None:
    streams = to_streams(random_clips(6), torch.ones(2), SIZE)
    assert streams.rgb.shape == (2, 6, 3, *SIZE)
    assert streams.depth.shape == (2, 6, 1, *SIZE)
    assert streams.ray_dir.shape == streams.ray_moment.shape == (2, 16, 3, 6, 8)
    assert streams.rgb.aminmax().min < -0.99
    assert streams.rgb.abs().max() <= 1
    assert streams.depth.abs().max() <= 1


def test_what_is_not_known_stays_none() -> None:
    clips, scale = random_clips(2), torch.ones(2)
    streams = to_streams(replace(clips, intrinsics=None), scale, SIZE)
    assert streams.ray_dir is None
    assert streams.ray_moment is None
    assert streams.depth is not None
    assert to_streams(Clips(rgb=clips.rgb), scale, SIZE).depth is None
    assert to_streams(Clips(depth=clips.depth), scale, SIZE).rgb is None


def test_missing_streams_make_no_clip() -> None:
    streams = to_streams(replace(random_clips(2), depth=None), torch.ones(2), SIZE)
    with pytest.raises(ValueError, match="streams: expected all four, got no depth"):
        to_clips(streams, 2, torch.ones(2))


def test_invalid_depth_becomes_the_farthest_of_the_clip() -> None:
    clips = random_clips(4)
    holes = with_holes(clips.depth)
    channel = to_streams(Clips(depth=holes), torch.tensor([2.0, 1.0]), SIZE).depth[:, :, 0]
    for clip, scale in enumerate((2.0, 1.0)):
        depth = holes[clip].double().numpy()
        valid = np.isfinite(depth) & (depth > 0)
        filled = np.where(valid, depth, depth[valid].max())
        np.testing.assert_allclose(channel[clip].numpy(), 2 / (1 + filled / scale) - 1, atol=1e-5)


def test_depth_without_a_valid_pixel_is_refused() -> None:
    depth = torch.ones(2, 3, *SIZE)
    depth[1] = float("nan")
    with pytest.raises(UserError, match="depth: expected at least one valid pixel"):
        to_streams(Clips(depth=depth), torch.ones(2), SIZE)


def context_of(frames: int, **observed: list[int]) -> Tensor:
    """`[1,4,F]`: which latent frames of which streams are observed."""
    context = torch.zeros(1, 4, len(frame_groups(frames)), dtype=torch.bool)
    for name, groups in observed.items():
        for stream in {"rgb": (RGB,), "depth": (DEPTH,), "camera": (RAY_DIR, RAY_MOMENT)}[name]:
            context[0, stream, groups] = True
    return context


def scale_of(clips: Clips, context: Tensor, frames: int = 10) -> float:
    return float(observed_scale(clips, context, frame_groups(frames)))


def test_scale_is_the_median_of_the_observed_depths_whatever_else_is_observed() -> None:
    clips = random_clips(10, batch=1)
    clips = replace(clips, depth=with_holes(clips.depth))
    context = context_of(10, depth=[0, 1], camera=[0, 1, 2, 3], rgb=[0])
    seen = clips.depth[0, :5].double().numpy()  # latent frames 0 and 1 are frames 0 and 1-4
    assert scale_of(clips, context) == pytest.approx(float(np.median(seen[np.isfinite(seen) & (seen > 0)])), rel=1e-6)


def test_scale_without_depth_is_the_extent_of_the_observed_cameras() -> None:
    clips = random_clips(10, batch=1)
    centres = clips.cam_to_world[0, :, :3, 3].double().numpy()
    expected = np.linalg.norm(centres[1:5] - centres[1], axis=1).max()  # latent frame 1 alone
    assert scale_of(clips, context_of(10, camera=[1])) == pytest.approx(float(expected), rel=1e-6)
    blind = replace(clips, depth=torch.zeros_like(clips.depth))
    assert scale_of(blind, context_of(10, camera=[1], depth=[0])) == pytest.approx(float(expected), rel=1e-6)


def test_half_a_camera_gives_no_scale() -> None:
    """Both ray streams go with a camera: a direction alone says nothing of lengths."""
    clips = random_clips(10, batch=1)
    context = context_of(10)
    context[0, RAY_DIR] = True
    assert scale_of(clips, context) == scale_of(clips, context_of(10))


def test_scale_without_any_of_both_comes_from_the_truth() -> None:
    clips = random_clips(10, batch=1)
    truth = float(np.median(clips.depth.double().numpy()))
    assert scale_of(clips, context_of(10, rgb=[0, 1])) == pytest.approx(truth, rel=1e-6)
    centres = clips.cam_to_world[0, :, :3, 3].double().numpy()
    extent = float(np.linalg.norm(centres - centres[0], axis=1).max())
    assert scale_of(replace(clips, depth=None), context_of(10)) == pytest.approx(extent, rel=1e-6)
    assert scale_of(Clips(rgb=clips.rgb), context_of(10)) == 1.0


def test_an_observed_depth_map_without_a_valid_pixel_says_nothing() -> None:
    clips = random_clips(10, batch=1)
    depth = clips.depth.clone()
    depth[:, 0] = float("nan")
    truth = float(np.median(depth[0, 1:].double().numpy()))
    assert scale_of(replace(clips, depth=depth), context_of(10, depth=[0])) == pytest.approx(truth, rel=1e-6)


def test_cameras_that_stand_still_give_scale_one() -> None:
    clips = random_clips(10, batch=1)
    still = replace(clips, depth=None, cam_to_world=torch.eye(4).expand(1, 10, 4, 4))
    assert scale_of(still, context_of(10, camera=[0, 1, 2, 3])) == 1.0


def test_each_clip_of_a_batch_has_a_scale_of_its_own() -> None:
    clips = random_clips(10, batch=2)
    context = torch.cat((context_of(10, depth=[3]), context_of(10, camera=[0, 3])))
    scales = observed_scale(clips, context, frame_groups(10))
    assert scales.shape == (2,)
    assert float(scales[0]) == pytest.approx(float(np.median(clips.depth[0, 9].double().numpy())), rel=1e-6)
    assert float(scales[1]) == pytest.approx(float(clips.cam_to_world[1, 9, :3, 3].norm()), rel=1e-6)


def test_what_a_codec_cannot_tell_apart_counts_as_a_hundred_scales() -> None:
    channel = torch.tensor([[[[-1.0, -0.999, -0.9, 0.0, 0.5]]]])
    depth = decoded_depth(channel, torch.tensor([2.0]))
    torch.testing.assert_close(depth[0, 0, 0], torch.tensor([200.0, 200.0, 38.0, 2.0, 2 / 3]), rtol=1e-4, atol=0)
