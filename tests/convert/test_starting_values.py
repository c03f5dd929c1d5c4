"""Statistics of the ray streams: what a fresh measurement finds, too."""

from __future__ import annotations

from dataclasses import replace

import torch

from u4d.clips import Clips, join
from u4d.convert.starting_values import REFERENCE_FOV_RAD, latent_statistics
from u4d.data.procedural import render_clips
from u4d.diffusion.flow import RAY_CHANNELS, STREAMS
from u4d.geometry.cameras import relative_to_first
from u4d.model.latents import Statistics, encode_streams
from u4d.model.streams import observed_scale, to_streams
from u4d_fast.time_layout import frame_groups

SIZE, FRAMES = (24, 32), 50


def test_measured_rays_have_about_zero_mean_and_unit_deviation() -> None:
    clips = join([render_clips(range(first, first + 4), split="val", frames=FRAMES, size=SIZE) for first in (0, 4)])
    _, depth, intrinsics, cam_to_world = clips.everything()
    groups = frame_groups(FRAMES)
    nothing_observed = torch.zeros(len(depth), len(STREAMS), len(groups), dtype=torch.bool)
    known = Clips(depth=depth, intrinsics=intrinsics, cam_to_world=relative_to_first(cam_to_world))
    scale = observed_scale(known, nothing_observed, groups)
    mean, std = latent_statistics([0.0] * 16, [1.0] * 16)
    statistics = Statistics(torch.tensor(mean), torch.tensor(std), REFERENCE_FOV_RAD)
    rays = replace(to_streams(known, scale, SIZE), depth=None)
    latents = encode_streams(rays, None, statistics)[:, 2:]  # no codec: rays are packed, not encoded
    used = latents[:, :, :RAY_CHANNELS].transpose(0, 2).flatten(2)
    # Eight clips scatter: the deviation of a moment's z by a factor of 1.5.
    assert used.std(-1).min() > 0.6 and used.std(-1).max() < 1.7
    assert used.mean(-1).abs().max() < 0.5
    assert not latents[:, :, RAY_CHANNELS:].any()
    fov = 2 * torch.atan(SIZE[1] / 2 / intrinsics[..., 0, 0])
    assert abs(float(fov.mean()) - REFERENCE_FOV_RAD) < 0.15


def test_rows_are_those_of_the_vae_and_of_four_packed_frames() -> None:
    mean, std = latent_statistics([0.5] * 16, [2.0] * 16)
    assert mean[0] == mean[1] == (0.5,) * 16 and std[0] == std[1] == (2.0,) * 16
    for row in (*mean[2:], *std[2:]):
        assert row[:3] * 4 == row[:12]
    assert all(row[12:] == (0.0,) * 4 for row in mean[2:]) and all(row[12:] == (1.0,) * 4 for row in std[2:])
