"""Laws of the four-stream transformer: who may depend on what, and what an untrained one does."""

from __future__ import annotations

import json

import pytest
import torch
from model_samples import own_stream_mask, random_inputs, random_transformer, relative_error, small_config
from torch import Tensor

from u4d import presets
from u4d.errors import UserError
from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig

STREAM_NAMES = ("condition_embedder", "blocks", "patch_embedding", "proj_out", "scale_shift_table")


def changed_groups(before: Tensor, after: Tensor) -> Tensor:
    """[B,4,F]: which groups of two velocities differ at all."""
    return (before != after).any(dim=(2, -2, -1))


@torch.no_grad()
@pytest.mark.parametrize("frames", (1, 2, 5))
@pytest.mark.parametrize("size", ((2, 2), (4, 6)))
def test_velocity_has_the_shape_of_the_latents(frames: int, size: tuple[int, int]) -> None:
    latents, times, text = random_inputs(2, frames, size)
    for model in (random_transformer(), random_transformer(motion_features=True, rgb_to_geometry=True)):
        velocity = model(latents, times, text)
        assert velocity.shape == latents.shape
        assert velocity.isfinite().all()


@torch.no_grad()
def test_clips_of_a_batch_do_not_meet() -> None:
    model = random_transformer(motion_features=True, rgb_to_geometry=True)
    latents, times, text = random_inputs(3)
    together = model(latents, times, text)
    for clip in range(3):
        alone = model(latents[clip : clip + 1], times[clip : clip + 1], text[clip : clip + 1])
        assert relative_error(alone[0], together[clip]) < 1e-5


@torch.no_grad()
def test_a_group_that_sees_itself_alone_depends_on_itself_alone() -> None:
    """Latents and noise level of one group reach no other group but through attention."""
    model = random_transformer()
    latents, times, text = random_inputs()
    mask = torch.eye(12, dtype=torch.bool)[None]
    before = model(latents, times, text, mask)
    for stream, frame in ((0, 0), (2, 1), (3, 2)):
        other = latents.clone()
        other[:, stream, :, frame] += 1
        later = times.clone()
        later[:, stream, frame] /= 2
        expected = torch.zeros(1, 4, 3, dtype=torch.bool)
        expected[:, stream, frame] = True
        assert torch.equal(changed_groups(before, model(other, times, text, mask)), expected)
        assert torch.equal(changed_groups(before, model(latents, later, text, mask)), expected)


@torch.no_grad()
def test_the_rgb_link_hands_geometry_the_rgb_of_its_own_frame_unless_that_is_noise() -> None:
    model = random_transformer(rgb_to_geometry=True)
    latents, times, text = random_inputs()
    times[0, 0] = torch.tensor([0.0, 0.4, 1.0])
    mask = torch.eye(12, dtype=torch.bool)[None]
    before = model(latents, times, text, mask)
    for frame in range(3):
        other = latents.clone()
        other[:, 0, :, frame] += 1
        expected = torch.zeros(1, 4, 3, dtype=torch.bool)
        expected[:, : 4 if frame < 2 else 1, frame] = True
        assert torch.equal(changed_groups(before, model(other, times, text, mask)), expected)


@torch.no_grad()
def test_a_missing_group_is_seen_by_nobody() -> None:
    model = random_transformer()
    latents, times, text = random_inputs()
    exists = torch.ones(1, 12, dtype=torch.bool)
    exists[0, 4] = False  # depth, latent frame 1
    other = latents.clone()
    other[:, 1, :, 1] += 1
    changed = changed_groups(model(latents, times, text, exists), model(other, times, text, exists))
    assert changed.nonzero().tolist() == [[0, 1, 1]]


@torch.no_grad()
def test_streams_are_told_apart_by_their_weights_alone() -> None:
    """Exchange the weights of the streams and their latents: the velocities are exchanged."""
    model = random_transformer()
    latents, times, text = random_inputs()
    order = torch.tensor([2, 0, 3, 1])
    exchanged = random_transformer()
    weights = {
        name: tensor[order] if name.startswith(STREAM_NAMES) else tensor for name, tensor in model.state_dict().items()
    }
    exchanged.load_state_dict(weights)
    velocity = exchanged(latents[:, order], times[:, order], text)
    assert relative_error(velocity, model(latents, times, text)[:, order]) < 1e-5


@torch.no_grad()
def test_an_untrained_head_inverts_the_patch_embedding() -> None:
    model = Transformer(presets.tiny().transformer)
    latents = torch.randn(2, 4, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    patches = model.proj_out(model.patch_embedding(latents))  # [S,B,P,(row, column, channel)]
    found = patches.reshape(4, 2, 1, 2, 3, 2, 2, 16).permute(1, 0, 7, 2, 3, 5, 4, 6).reshape(latents.shape)
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


def test_every_parameter_is_trained() -> None:
    model = random_transformer(motion_features=True, rgb_to_geometry=True)
    torch.nn.init.normal_(model.motion.grey_single)
    torch.nn.init.normal_(model.motion.grey_group)
    latents, times, text = random_inputs(frames=4)
    times[:, 0] = 0
    model(latents, times, text).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().amax() > 0, name
        if name.startswith(STREAM_NAMES):
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    latents, times, text = random_inputs()
    gradients = []
    for checkpointing in (False, True):
        model = random_transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(latents, times, text, own_stream_mask(1, 3)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_half_precision_stays_close() -> None:
    model = random_transformer(motion_features=True, rgb_to_geometry=True)
    latents, times, text = random_inputs()
    truth = model(latents, times, text)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(latents, times, text)
    assert ((mixed - truth).square().mean() / truth.square().mean()).sqrt() < 0.02
    half = model.bfloat16()(latents.bfloat16(), times, text.bfloat16())
    assert half.dtype == torch.bfloat16
    assert ((half - truth).square().mean() / truth.square().mean()).sqrt() < 0.05


def test_configuration_survives_json() -> None:
    rows = tuple(tuple(float(channel) for channel in range(1, 17)) for _ in range(4))
    config = small_config(latents_mean=rows, latents_std=rows, image_size=(48, 64), motion_features=True)
    model = Transformer(config)
    again = Transformer.from_config(json.loads(model.to_json_string()))
    saved = {name: value for name, value in again.config.items() if not name.startswith("_")}
    assert TransformerConfig(**saved) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 2),
        ("num_layers", 0),
        ("num_layers", "two"),
        ("attention_head_dim", 13),
        ("freq_dim", 15),
        ("image_size", [30, 48]),
        ("latents_mean", [[0.0] * 16] * 3),
        ("latents_std", [[float("nan")] * 16] * 4),
        ("latents_std", [[0.0] * 16] * 4),
        ("reference_fov_rad", 4.0),
        ("ray_basis", "haar"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(field: str, value: object) -> None:
    config = json.loads(Transformer(small_config()).to_json_string())
    with pytest.raises(UserError, match=field):
        Transformer.from_config(config | {field: value})


@pytest.mark.parametrize(
    ("name", "latents", "times", "text"),
    [
        ("latents", (1, 3, 16, 3, 4, 6), (1, 3, 3), (1, 2, 8)),
        ("latents", (1, 4, 12, 3, 4, 6), (1, 4, 3), (1, 2, 8)),
        ("latents", (1, 4, 16, 3, 5, 6), (1, 4, 3), (1, 2, 8)),
        ("latents", (4, 16, 3, 4, 6), (1, 4, 3), (1, 2, 8)),
        ("times", (1, 4, 16, 3, 4, 6), (1, 4, 2), (1, 2, 8)),
        ("times", (1, 4, 16, 3, 4, 6), (1,), (1, 2, 8)),
        ("text", (1, 4, 16, 3, 4, 6), (1, 4, 3), (1, 2, 9)),
        ("text", (1, 4, 16, 3, 4, 6), (1, 4, 3), (2, 2, 8)),
    ],
)
def test_wrong_shapes_are_named(name: str, latents: tuple, times: tuple, text: tuple) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .* got"):
        random_transformer()(torch.zeros(latents), torch.zeros(times), torch.zeros(text))
