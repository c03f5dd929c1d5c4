"""Streams to normalised latents and back, with a stub codec that loses nothing on clips of one colour per cell."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch
from random_clips import SIZE, assert_same_cameras, random_clips
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from u4d.clips import Clips
from u4d.geometry.cameras import fov_to_intrinsics
from u4d.model.latents import Statistics, decode_latents, encode_streams, ray_basis_matrix
from u4d.model.streams import Streams, to_clips, to_streams
from u4d.presets import RAY_BASES
from u4d_fast.time_layout import frame_groups, latent_frame_of, latent_frames

CELL = 8


class CellMeans:
    """Packs the four frames of a group as the mean colours of their cells, like the ray streams."""

    def encode(self, clip: Tensor, stream: str) -> Tensor:
        means = avg_pool2d(clip.flatten(0, 1), CELL).unflatten(0, clip.shape[:2])
        packed = means[:, frame_groups(clip.shape[1])].flatten(2, 3)  # [B,F,4C,h,w]
        empty = packed.new_zeros(*packed.shape[:2], 16 - packed.shape[2], *packed.shape[3:])
        return torch.cat((packed, empty), dim=2).transpose(1, 2)

    def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor:
        channels = {"rgb": 3, "depth": 1}[stream]
        by_group = latents.transpose(1, 2)[:, :, : 4 * channels].unflatten(2, (4, channels))
        owner, groups = latent_frame_of(num_frames), frame_groups(num_frames)
        place = [groups[owner[frame]].tolist().index(frame) for frame in range(num_frames)]
        images = by_group[:, owner, place]
        return interpolate(images.flatten(0, 1), scale_factor=CELL).unflatten(0, images.shape[:2])


def random_statistics(seed: int = 0, ray_basis: str = "frames") -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    return Statistics(
        mean=torch.randn(4, 16, generator=generator),
        std=0.1 + torch.rand(4, 16, generator=generator),
        reference_fov_rad=1.1,
        ray_basis=ray_basis,
    )


def cellwise_clips(frames: int) -> Clips:
    """Random clips whose images have one colour and one depth per cell."""
    clips = random_clips(frames)
    coarse = avg_pool2d(clips.depth, CELL).repeat_interleave(CELL, -1).repeat_interleave(CELL, -2)
    rgb = avg_pool2d(clips.rgb.flatten(0, 1), CELL).unflatten(0, clips.rgb.shape[:2])
    return replace(clips, depth=coarse, rgb=rgb.repeat_interleave(CELL, -1).repeat_interleave(CELL, -2))


@pytest.mark.parametrize("ray_basis", RAY_BASES)
@pytest.mark.parametrize("frames", (1, 2, 4, 6, 9))
def test_encode_then_decode_gives_the_clips_back(frames: int, ray_basis: str) -> None:
    clips, scale = cellwise_clips(frames), torch.tensor([0.5, 2.0])
    statistics = random_statistics(ray_basis=ray_basis)
    latents = encode_streams(to_streams(clips, scale, SIZE), CellMeans(), statistics)
    assert latents.shape == (2, 4, 16, latent_frames(frames), SIZE[0] // CELL, SIZE[1] // CELL)
    back, residual = to_clips(decode_latents(latents, CellMeans(), statistics, frames), frames, scale)
    torch.testing.assert_close(back.rgb, clips.rgb, rtol=0, atol=1e-5)
    torch.testing.assert_close(back.depth, clips.depth, rtol=1e-4, atol=0)
    assert_same_cameras(back, clips)
    assert residual.max() < 1e-4


def test_normalisation_per_stream_and_channel() -> None:
    """Against the definition, written out: (raw - mean) / std, with the reference camera's rays subtracted."""
    clips, statistics = random_clips(6), random_statistics()
    streams = to_streams(clips, torch.ones(2), SIZE)
    latents = encode_streams(streams, CellMeans(), statistics)
    focal = SIZE[1] / 2 / math.tan(statistics.reference_fov_rad / 2)
    v, u = np.meshgrid(np.arange(4, SIZE[0], CELL), np.arange(4, SIZE[1], CELL), indexing="ij")
    ray = np.stack([(u - SIZE[1] / 2) / focal, (v - SIZE[0] / 2) / focal, np.ones(u.shape)])
    reference = np.concatenate([np.tile(ray / np.linalg.norm(ray, axis=0), (4, 1, 1)), np.zeros((4, *u.shape))])
    raw = (
        CellMeans().encode(streams.rgb, "rgb"),
        CellMeans().encode(streams.depth, "depth"),
        streams.ray_dir - torch.from_numpy(reference).float()[:, None],
        streams.ray_moment,
    )
    for stream in range(4):
        for channel in range(16):
            expected = (raw[stream][:, channel] - statistics.mean[stream, channel]) / statistics.std[stream, channel]
            torch.testing.assert_close(latents[:, stream, channel], expected, rtol=1e-4, atol=1e-5)


def test_the_cosine_basis_is_scipys() -> None:
    frames = np.random.default_rng(0).normal(size=(4, 3))
    expected = scipy.fft.dct(frames, type=2, norm="ortho", axis=0)
    np.testing.assert_allclose(ray_basis_matrix("dct").numpy() @ frames, expected, atol=1e-6)


def test_in_the_cosine_basis_a_still_group_has_a_mean_and_no_change() -> None:
    """The first and the last latent frame hold one frame four times."""
    unit = Statistics(torch.zeros(4, 16), torch.ones(4, 16), reference_fov_rad=0.9, ray_basis="dct")
    streams = to_streams(random_clips(6), torch.ones(2), SIZE)
    latents = encode_streams(streams, CellMeans(), unit)[:, 2:]
    packed = encode_streams(streams, CellMeans(), replace(unit, ray_basis="frames"))[:, 2:]
    torch.testing.assert_close(latents[:, :, :3], packed[:, :, :12].unflatten(2, (4, 3)).sum(2) / 2)
    assert latents[:, :, 3:, [0, -1]].abs().max() < 1e-5 < latents[:, :, 3:12, 1].abs().mean()
    assert not latents[:, :, 12:].any()


def test_an_unknown_basis_is_refused() -> None:
    with pytest.raises(ValueError, match="ray_basis: expected one of frames, dct, got 'haar'"):
        ray_basis_matrix("haar")


def test_the_reference_camera_has_latents_of_zero() -> None:
    unit = Statistics(torch.zeros(4, 16), torch.ones(4, 16), reference_fov_rad=0.9)
    clips = Clips(
        intrinsics=fov_to_intrinsics(0.9, SIZE).expand(1, 6, 3, 3), cam_to_world=torch.eye(4).expand(1, 6, 4, 4)
    )
    latents = encode_streams(to_streams(clips, torch.ones(1), SIZE), CellMeans(), unit)
    assert latents.abs().max() < 1e-6


def test_a_missing_stream_is_zero_and_the_others_are_as_ever() -> None:
    streams, statistics = to_streams(random_clips(6), torch.ones(2), SIZE), random_statistics()
    everything = encode_streams(streams, CellMeans(), statistics)
    for stream, name in enumerate(("rgb", "depth", "ray_dir", "ray_moment")):
        latents = encode_streams(replace(streams, **{name: None}), CellMeans(), statistics)
        assert not latents[:, stream].any()
        others = [other for other in range(4) if other != stream]
        assert torch.equal(latents[:, others], everything[:, others])


def test_nothing_known_is_refused() -> None:
    with pytest.raises(ValueError, match="streams: expected at least one"):
        encode_streams(Streams(), CellMeans(), random_statistics())
