"""Wan's VAE as a codec: against diffusers' own calls written out, and by what a latent may depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor
from wan_vaes import relative, seeded, small_vae

from u4d.errors import UserError
from u4d.model.codec import IMAGE_CHANNELS, TinyCodec
from u4d.model.wan_codec import TILE_ABOVE, WanCodec, as_codec
from u4d_fast.time_layout import frame_groups, latent_frame_of, latent_frames

STREAMS = tuple(IMAGE_CHANNELS)


@pytest.fixture(scope="module")
def codec() -> WanCodec:
    return WanCodec(small_vae())


def random_clip(stream: str, frames: int, size: tuple[int, int] = (16, 32), batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return 2 * torch.rand(batch, frames, IMAGE_CHANNELS[stream], *size, generator=generator) - 1


def random_latents(frames: int, size: tuple[int, int] = (2, 4), batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 16, latent_frames(frames), *size, generator=generator)


def changed_latents(codec: WanCodec, clip: Tensor, frame: int, stream: str) -> list[int]:
    """Latent frames whose values change with one frame of the clip."""
    other = clip.clone()
    other[:, frame] *= -0.5
    changed = (codec.encode(other, stream) != codec.encode(clip, stream)).any(dim=(0, 1, 3, 4))
    return changed.nonzero().flatten().tolist()


@torch.no_grad()
@pytest.mark.parametrize("frames", (1, 2, 3, 5, 6, 7, 10, 14))
def test_equals_diffusers_called_by_hand(codec: WanCodec, frames: int) -> None:
    """Which frames go into which call is written out for these lengths, not taken from the time layout."""
    video = random_clip("rgb", frames)
    filled = {3: [0, 1, 1, 1, 1], 5: [0, 1, 2, 3, 3], 7: [0, 1, 2, 3, 4, 5, 5, 5, 5]}  # the causal part, to 1 + 4k
    causal = filled.get(frames, list(range(max(frames - 1, 1))))

    def encode(indices: list[int]) -> Tensor:
        return codec.vae.encode(video[:, indices].transpose(1, 2)).latent_dist.mean

    def decode(latents: Tensor) -> Tensor:
        return codec.vae.decode(latents).sample.transpose(1, 2)

    parts = [encode(causal)] if frames == 1 else [encode(causal), encode([frames - 1])]
    expected = torch.cat(parts, dim=2)
    latents = codec.encode(video, "rgb")
    assert latents.shape[2] == latent_frames(frames) == len(causal) // 4 + len(parts)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-6)

    images = [decode(latents[:, :, : len(causal) // 4 + 1])[:, : max(frames - 1, 1)]]
    images += [] if frames == 1 else [decode(latents[:, :, -1:])]
    torch.testing.assert_close(codec.decode(latents, "rgb", frames), torch.cat(images, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("frames", "size"),
    [*((frames, (16, 16)) for frames in range(1, 20)), (6, (16, 48)), (7, (48, 32)), (3, (80, 16)), (2, (8, 24))],
)
def test_shapes_for_every_number_of_frames_and_size(codec: WanCodec, frames: int, size: tuple[int, int]) -> None:
    stream = STREAMS[frames % 2]
    clip = random_clip(stream, frames, size)
    latents = codec.encode(clip, stream)
    assert latents.shape == (1, 16, latent_frames(frames), size[0] // 8, size[1] // 8)
    decoded = codec.decode(latents, stream, frames)
    assert decoded.shape == clip.shape and decoded.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("frames", (2, 3, 6, 8, 10))
def test_a_latent_depends_on_its_own_frames_and_earlier_ones(codec: WanCodec, frames: int) -> None:
    """The first on frame 0 alone, the last on the last frame alone, and none on a later frame."""
    clip = random_clip("rgb", frames)
    last = latent_frames(frames) - 1
    for frame, owner in enumerate(latent_frame_of(frames).tolist()):
        expected = [owner] if owner == last else list(range(owner, last))
        assert changed_latents(codec, clip, frame, "rgb") == expected


@torch.no_grad()
@pytest.mark.parametrize("frames", (2, 3, 6, 10))
def test_a_decoded_frame_depends_on_its_own_latent_and_earlier_ones(codec: WanCodec, frames: int) -> None:
    latents = random_latents(frames)
    images = codec.decode(latents, "rgb", frames)
    owners, last = latent_frame_of(frames), latents.shape[2] - 1
    for owner in range(last + 1):
        other = latents.clone()
        other[:, :, owner] += 1
        changed = (codec.decode(other, "rgb", frames) != images).any(dim=(0, 2, 3, 4))
        expected = owners == last if owner == last else (owners >= owner) & (owners < last)
        assert changed.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("frames", (3, 4, 5, 7, 9))
def test_a_group_that_is_not_filled_repeats_its_last_frame(codec: WanCodec, frames: int) -> None:
    clip = random_clip("rgb", frames)
    groups = frame_groups(frames)
    filled = torch.cat((groups[0, :1], groups[1:-1].flatten(), groups[-1, :1]))
    torch.testing.assert_close(codec.encode(clip[:, filled], "rgb"), codec.encode(clip, "rgb"), rtol=0, atol=0)


@torch.no_grad()
def test_depth_is_three_equal_channels_and_their_mean(codec: WanCodec) -> None:
    depth = random_clip("depth", 6)
    torch.testing.assert_close(
        codec.encode(depth, "depth"), codec.encode(depth.repeat(1, 1, 3, 1, 1), "rgb"), rtol=0, atol=0
    )
    latents = random_latents(6)
    channels = codec.decode(latents, "rgb", 6)
    assert channels.std(dim=2).max() > 0.05  # they differ, so the mean is not any one of them
    expected = (channels[:, :, :1] + channels[:, :, 1:2] + channels[:, :, 2:]) / 3
    torch.testing.assert_close(codec.decode(latents, "depth", 6), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_decoded_images_are_clamped(codec: WanCodec) -> None:
    strong = small_vae()
    strong.load_state_dict(codec.vae.state_dict())
    strong.decoder.conv_out.weight.mul_(100)
    images = WanCodec(strong).decode(random_latents(6), "rgb", 6)
    assert images.min() == -1 and images.max() == 1


@torch.no_grad()
@pytest.mark.parametrize("stream", STREAMS)
def test_a_batch_is_coded_clip_by_clip(codec: WanCodec, stream: str) -> None:
    clips = random_clip(stream, 6, batch=3)
    latents = codec.encode(clips, stream)
    images = codec.decode(latents, stream, 6)
    for index in range(3):
        assert torch.equal(codec.encode(clips[index : index + 1], stream)[0], latents[index])
        assert torch.equal(codec.decode(latents[index : index + 1], stream, 6)[0], images[index])


def test_a_batch_never_reaches_the_vae_as_one(codec: WanCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for name in ("_encode", "_decode"):
        method = getattr(codec.vae, name)
        monkeypatch.setattr(codec.vae, name, lambda x, m=method, **given: (sizes.append(len(x)), m(x, **given))[1])
    with torch.no_grad():
        codec.decode(codec.encode(random_clip("rgb", 2, batch=3), "rgb"), "rgb", 2)
    assert sizes == [1] * 12


@torch.no_grad()
@pytest.mark.parametrize(("attends", "limit"), [(True, 0.3), (False, 0.1)])
def test_tiles_change_values_little(attends: bool, limit: float) -> None:
    """diffusers' tiles (256, of which 64 are shared) on a picture 352 wide: columns 24 to 31 of 44 are blended.

    Where nothing attends to the whole picture, values further from a seam than convolutions reach are the very same.
    """
    vae = small_vae()
    if not attends:
        for block in (vae.encoder.mid_block.attentions[0], vae.decoder.mid_block.attentions[0]):
            block.proj.weight.zero_()
    whole, tiled = WanCodec(vae), WanCodec(vae, tile_above=16 * 352 - 1)
    clip, latents = random_clip("rgb", 6, (16, 352)), random_latents(6, (2, 44))
    for truth, value, cell in (
        (whole.encode(clip, "rgb"), tiled.encode(clip, "rgb"), 1),
        (whole.decode(latents, "rgb", 6), tiled.decode(latents, "rgb", 6), 8),
    ):
        assert value.shape == truth.shape
        assert 0 < relative(value, truth) < limit
        if not attends:
            for far in (slice(0, 18 * cell), slice(40 * cell, None)):
                torch.testing.assert_close(value[..., far], truth[..., far], rtol=0, atol=1e-4)


@torch.no_grad()
def test_tiles_only_where_asked_for_or_needed(codec: WanCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for name in ("tiled_encode", "tiled_decode"):
        method = getattr(codec.vae, name)
        monkeypatch.setattr(codec.vae, name, lambda *a, m=method, n=name, **k: (used.append(n), m(*a, **k))[1])
    for attribute, value in (("tile_sample_min_height", 16), ("tile_sample_min_width", 16)):
        monkeypatch.setattr(codec.vae, attribute, value)
    for attribute in ("tile_sample_stride_height", "tile_sample_stride_width"):
        monkeypatch.setattr(codec.vae, attribute, 8)

    def run(choice: WanCodec) -> list[str]:
        used.clear()
        choice.decode(choice.encode(random_clip("rgb", 1), "rgb"), "rgb", 1)
        return list(used)

    assert codec.tile_above == TILE_ABOVE >= 240 * 320
    assert run(codec) == run(WanCodec(codec.vae, tile_above=16 * 32)) == []
    assert run(WanCodec(codec.vae, tile_above=16 * 32 - 1)) == ["tiled_encode", "tiled_decode"]
    assert not codec.vae.use_tiling  # as it was
    codec.vae.enable_tiling()
    try:
        assert run(codec) == ["tiled_encode", "tiled_decode"] and codec.vae.use_tiling
    finally:
        codec.vae.disable_tiling()


@torch.no_grad()
@pytest.mark.parametrize("part", ("encoder", "decoder"))
def test_a_failed_call_leaves_nothing_behind(codec: WanCodec, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Out of memory in the middle of a clip: the next call gives what it always gave, and no feature is kept."""
    clip, latents = random_clip("rgb", 10), random_latents(10)
    truth = codec.encode(clip, "rgb"), codec.decode(latents, "rgb", 10)
    forward, calls = getattr(codec.vae, part).forward, []

    def fail(*given: Any, **named: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("in the second chunk")
        return forward(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(getattr(codec.vae, part), "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            codec.encode(clip, "rgb") if part == "encoder" else codec.decode(latents, "rgb", 10)
    assert not any(torch.is_tensor(kept) for kept in codec.vae._feat_map + codec.vae._enc_feat_map)
    assert torch.equal(codec.encode(clip, "rgb"), truth[0]) and torch.equal(codec.decode(latents, "rgb", 10), truth[1])


@torch.no_grad()
def test_half_precision_weights_take_and_give_float32(codec: WanCodec) -> None:
    half = WanCodec(small_vae().bfloat16())
    assert (half.dtype, codec.dtype, half.device) == (torch.bfloat16, torch.float32, torch.device("cpu"))
    clip, latents = random_clip("rgb", 6), random_latents(6)
    encoded, decoded = half.encode(clip, "rgb"), half.decode(latents, "depth", 6)
    assert encoded.dtype == decoded.dtype == torch.float32
    assert relative(encoded, codec.encode(clip, "rgb")) < 0.05
    assert relative(decoded, codec.decode(latents, "depth", 6)) < 0.05
    assert codec.encode(clip.bfloat16(), "rgb").dtype == torch.bfloat16


@torch.no_grad()
def test_the_code_is_the_mode_of_the_posterior(codec: WanCodec) -> None:
    clip = random_clip("rgb", 6)
    assert torch.equal(codec.encode(clip, "rgb"), codec.encode(clip, "rgb"))


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
def test_wrong_clips_are_refused_as_the_tiny_codec_does(
    codec: WanCodec, name: str, shape: tuple[int, ...], stream: str
) -> None:
    messages = []
    for other in (codec, TinyCodec(hidden=2, decoder_hidden=2, depth=1)):
        with pytest.raises(ValueError, match=rf"{name}: expected .* got") as caught:
            other.encode(torch.zeros(shape), stream)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_wrong_latents_are_refused(codec: WanCodec) -> None:
    latents = torch.zeros(1, 16, 3, 2, 2)
    with pytest.raises(ValueError, match=r"latents: expected F = 4 for 8 frames, got 3"):
        codec.decode(latents, "rgb", 8)
    with pytest.raises(ValueError, match=r"stream: expected .* got 'rays'"):
        codec.decode(latents, "rays", 6)
    with pytest.raises(ValueError, match=r"latents: expected \[B,16,3,h,w\], got \[1, 48, 3, 2, 2\]"):
        codec.decode(torch.zeros(1, 48, 3, 2, 2), "rgb", 6)


def test_a_component_becomes_a_codec() -> None:
    tiny, vae = TinyCodec(hidden=2, decoder_hidden=2, depth=1), small_vae()
    assert as_codec(tiny) is tiny
    wrapped = as_codec(vae)
    assert isinstance(wrapped, WanCodec) and wrapped.vae is vae and as_codec(wrapped) is wrapped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_dim": 48}, "z_dim = 16, got 48"),
        ({"is_residual": True, "decoder_base_dim": 4}, "is_residual = False, got True"),
        ({"patch_size": 2, "in_channels": 12, "out_channels": 12}, "in_channels = 3, got 12"),
        ({"patch_size": 2}, "patch_size = None, got 2"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial = 8, got 16"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal = 4, got 8"),
        ({"temperal_downsample": [False, True, False]}, r"= \(4, 8\), got \(2, 8\)"),
        ({"dim_mult": [1, 2, 4], "temperal_downsample": [True, True]}, r"= \(4, 8\), got \(4, 4\)"),
    ],
)
def test_variants_of_the_vae_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1, **changes)
    with pytest.raises(UserError, match=rf"vae: expected an AutoencoderKLWan with .*{message}; only Wan2\.1's"):
        as_codec(vae)


def test_other_classes_are_refused() -> None:
    with torch.device("meta"):
        image_vae = AutoencoderKL()
    with pytest.raises(UserError, match=r"vae: expected TinyCodec or AutoencoderKLWan, got AutoencoderKL:"):
        as_codec(image_vae)


def test_the_full_vae_has_the_published_size() -> None:
    """126.9 M parameters: `Wan2.1_VAE.pth` holds 508 MB of float32."""
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 126_892_531
    codec = WanCodec(vae)
    latents = codec.encode(torch.empty(1, 6, 3, 240, 320, device="meta"), "rgb")
    assert latents.shape == (1, 16, 3, 30, 40) and latents.device.type == codec.device.type == "meta"
    assert codec.decode(latents, "depth", 6).shape == (1, 6, 1, 240, 320)


@pytest.mark.slow
@torch.no_grad()
def test_a_real_picture_passes_through_the_full_vae() -> None:
    with seeded(0):
        codec = WanCodec(AutoencoderKLWan().eval())
    clip = random_clip("rgb", 1, (240, 320))
    latents = codec.encode(clip, "rgb")
    assert latents.shape == (1, 16, 1, 30, 40) and latents.isfinite().all() and latents.std() > 1e-3
    images = codec.decode(latents, "rgb", 1)
    assert images.shape == clip.shape and images.isfinite().all() and images.std() > 1e-3
