"""The tiny codec: shapes for every clip length, latents that depend on their own frames alone, an exact PCA start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_samples import randomise
from torch import Tensor

from u4d.errors import UserError
from u4d.model.codec import IMAGE_CHANNELS, FrameCoder, TinyCodec
from u4d_fast.time_layout import frame_groups, latent_frame_of, latent_frames

STREAMS = tuple(IMAGE_CHANNELS)


@pytest.fixture(scope="module")
def codec() -> TinyCodec:
    """Random everywhere: an untrained codec's convolutions add nothing, which would hide their faults."""
    return randomise(TinyCodec(hidden=6, depth=1), seed=0).eval()


def random_clip(stream: str, frames: int, size: tuple[int, int] = (16, 24), batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return 2 * torch.rand(batch, frames, IMAGE_CHANNELS[stream], *size, generator=generator) - 1


@torch.no_grad()
@pytest.mark.parametrize("frames", range(1, 19))
def test_shapes_for_every_number_of_frames(codec: TinyCodec, frames: int) -> None:
    for stream, size in ((STREAMS[0], (16, 24)), (STREAMS[1], (8, 8)), (STREAMS[1], (40, 16))):
        clip = random_clip(stream, frames, size, batch=2)
        latents = codec.encode(clip, stream)
        assert latents.shape == (2, 16, latent_frames(frames), size[0] // 8, size[1] // 8)
        decoded = codec.decode(latents, stream, frames)
        assert decoded.shape == clip.shape
        assert decoded.abs().max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("frames", (2, 3, 8, 10))
def test_a_latent_depends_on_its_own_frames_alone(codec: TinyCodec, stream: str, frames: int) -> None:
    clip = random_clip(stream, frames)
    latents = codec.encode(clip, stream)
    for frame, owner in enumerate(latent_frame_of(frames).tolist()):
        other = clip.clone()
        other[:, frame] *= -0.5
        changed = (codec.encode(other, stream) != latents).any(dim=(0, 1, 3, 4))
        assert changed.nonzero().flatten().tolist() == [owner]


@torch.no_grad()
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("frames", (2, 3, 8, 10))
def test_a_decoded_frame_depends_on_its_own_latent_alone(codec: TinyCodec, stream: str, frames: int) -> None:
    latents = codec.encode(random_clip(stream, frames), stream)
    images = codec.decode(latents, stream, frames)
    owners = latent_frame_of(frames)
    for latent_frame in range(latents.shape[2]):
        other = latents.clone()
        other[:, :, latent_frame] *= -0.5
        changed = (codec.decode(other, stream, frames) != images).any(dim=(0, 2, 3, 4))
        assert torch.equal(changed, owners == latent_frame)


@torch.no_grad()
@pytest.mark.parametrize("frames", (3, 4, 5, 7, 9))
def test_a_short_group_repeats_its_last_frame_and_decoding_drops_the_repeats(codec: TinyCodec, frames: int) -> None:
    clip = random_clip("rgb", frames)
    groups = frame_groups(frames)
    filled = torch.cat((groups[:1, 0], groups[1:-1].flatten(), groups[-1:, 0]))  # as many frames as the groups hold
    latents = codec.encode(clip, "rgb")
    assert torch.equal(latents, codec.encode(clip[:, filled], "rgb"))
    everything = codec.decode(latents, "rgb", len(filled))
    kept = [*range(frames - 1), len(filled) - 1]
    assert torch.equal(codec.decode(latents, "rgb", frames), everything[:, kept])


def test_clips_of_a_batch_do_not_meet(codec: TinyCodec) -> None:
    clip = random_clip("rgb", 6, batch=3)
    with torch.no_grad():
        together = codec.encode(clip, "rgb")
        for index in range(3):
            torch.testing.assert_close(codec.encode(clip[index : index + 1], "rgb")[0], together[index])


@torch.no_grad()
def test_half_precision_weights_take_and_give_float32(codec: TinyCodec) -> None:
    half = randomise(TinyCodec(hidden=6, depth=1), seed=0).bfloat16()
    clip = random_clip("rgb", 6)
    latents = half.encode(clip, "rgb")
    assert latents.dtype == half.decode(latents, "rgb", 6).dtype == torch.float32
    truth = codec.encode(clip, "rgb")
    assert (latents - truth).norm() < 0.03 * truth.norm()


@torch.no_grad()
def test_the_pca_start_is_the_best_linear_code() -> None:
    """Its squared error is the sum of the singular values left out, squared (Eckart and Young); latents are white."""
    pixels, latents, samples = 64, 16, 500
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(samples, pixels, generator=generator) * torch.linspace(2, 0.05, pixels) + 3
    coder = FrameCoder(pixels, latents, hidden=4, decoder_hidden=8, depth=1)
    coder.start_as_pca(cells)
    codes = coder.encode(cells[..., None, None])
    error = (coder.decode(codes).flatten(1) - cells).square().sum()
    centred = cells.double().numpy() - cells.double().numpy().mean(0)
    left_out = np.linalg.svd(centred, compute_uv=False)[latents:]
    assert float(error) == pytest.approx(float((left_out**2).sum()), rel=1e-3)
    torch.testing.assert_close(torch.cov(codes.flatten(1).T, correction=0), torch.eye(latents), rtol=0, atol=1e-3)
    torch.testing.assert_close(codes.flatten(1).mean(0), torch.zeros(latents), rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_pca_start_survives_cells_that_hardly_vary() -> None:
    """Fewer components than channels, such as an untextured wall: no division by nothing, and nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(100, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    coder = FrameCoder(64, 16, hidden=4, decoder_hidden=8, depth=1)
    coder.start_as_pca(cells)
    codes = coder.encode(cells[..., None, None])
    assert codes.abs().max() < 10
    torch.testing.assert_close(coder.decode(codes).flatten(1), cells, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "stream"),
    [
        ("stream", (1, 2, 3, 16, 16), "ray_dir"),
        ("clip", (1, 2, 1, 16, 16), "rgb"),
        ("clip", (1, 2, 3, 16, 16), "depth"),
        ("clip", (1, 2, 3, 16, 12), "rgb"),
        ("clip", (2, 3, 16, 16), "rgb"),
    ],
)
def test_wrong_clips_are_refused(codec: TinyCodec, name: str, shape: tuple[int, ...], stream: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .* got"):
        codec.encode(torch.zeros(shape), stream)


def test_wrong_latents_are_refused(codec: TinyCodec) -> None:
    latents = torch.zeros(1, 16, 3, 2, 2)
    with pytest.raises(ValueError, match=r"latents: expected F = 4 for 8 frames, got 3"):
        codec.decode(latents, "rgb", 8)
    with pytest.raises(ValueError, match=r"stream: expected .* got 'rays'"):
        codec.decode(latents, "rays", 6)


@pytest.mark.parametrize(("field", "value"), [("hidden", 0), ("depth", "one"), ("width", 8)])
def test_configurations_that_make_no_sense_are_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        TinyCodec.from_config({"latent_channels": 16, "hidden": 8, "depth": 1} | {field: value})
