"""fp8 in the place of exact matrix products: what changes, what stays, and the way back."""

from __future__ import annotations

import weakref

import pytest
import torch
from model_samples import random_inputs, random_transformer, relative_error
from wan_models import small_wan

import u4d_fast
from u4d import presets
from u4d.model.lora import LoRAConfig, add_lora, lora_layers
from u4d.model.stacked import StackedLinear

LARGEST_ERROR = 0.01  # of the velocity, measured: 0.003


@torch.no_grad()
@pytest.mark.parametrize("precision", ("fp8", "fp8-linear"))
def test_fp8_is_close_and_restore_is_exact(precision: presets.Precision) -> None:
    model, inputs = random_transformer(), random_inputs(2)
    truth, weights = model(*inputs), {name: value.clone() for name, value in model.state_dict().items()}
    assert u4d_fast.accelerate(model, precision=precision) is model
    report = u4d_fast.acceleration(model)
    assert report.precision == precision and report.left == {}
    error = float(relative_error(model(*inputs), truth))
    assert 1e-5 < error < LARGEST_ERROR
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    u4d_fast.restore(model)
    assert u4d_fast.acceleration(model).precision == "exact"
    assert torch.equal(model(*inputs), truth)


@torch.no_grad()
def test_masks_and_text_keys_mean_the_same_in_fp8() -> None:
    model, (latents, times, text) = random_transformer(), random_inputs(2)
    mask = torch.eye(12, dtype=torch.bool).expand(2, -1, -1)
    keys = model.text_keys(text)
    truth = model(latents, times, keys, mask)
    u4d_fast.accelerate(model, precision="fp8")
    error = float(relative_error(model(latents, times, keys, mask), truth))
    assert 1e-5 < error < LARGEST_ERROR
    assert float(relative_error(model(latents, times, keys), truth)) > 3 * error


@torch.no_grad()
def test_where_all_see_all_the_fastest_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (latents, times, text) = random_transformer(), random_inputs()
    asked: list[str] = []
    for name in ("dense_attention", "multi_stream_attention"):
        op = getattr(u4d_fast, name)
        monkeypatch.setattr(u4d_fast, name, lambda *args, op=op, name=name: asked.append(name) or op(*args))
    model(latents, times, text)
    model(latents, times, text, torch.ones(1, 12, dtype=torch.bool))
    assert asked == ["dense_attention"] * 2 + ["multi_stream_attention"] * 2


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    model, inputs = random_transformer(), random_inputs()
    u4d_fast.accelerate(model, precision="fp8-linear")
    before = model(*inputs)
    kept = model.blocks[0].attn1.to_q.weight_in_fp8()
    assert model.blocks[0].attn1.to_q.weight_in_fp8() is kept
    for part in model.modules():
        if isinstance(part, StackedLinear):
            part.weight.mul_(0.5)
    u4d_fast.restore(model)
    truth = model(*inputs)
    u4d_fast.accelerate(model, precision="fp8-linear")
    assert float(relative_error(model(*inputs), truth)) < LARGEST_ERROR
    model.load_state_dict(random_transformer(seed=1).state_dict())
    after = model(*inputs)
    assert float(relative_error(after, random_transformer(seed=1)(*inputs))) < LARGEST_ERROR
    assert float(relative_error(before, after)) > 0.1


@torch.no_grad()
def test_weights_that_move_leave_nothing_behind() -> None:
    """Under offload the transformer goes back to the CPU after each use."""
    model, inputs = random_transformer(), random_inputs()
    u4d_fast.accelerate(model, precision="fp8-linear")
    layer, expected = model.blocks[0].attn1.to_q, model(*inputs)
    kept = weakref.ref(layer.weight_in_fp8().values)
    assert kept() is not None
    model.to(torch.float64)
    assert kept() is None
    assert torch.equal(model.float()(*inputs), expected)


@torch.no_grad()
def test_a_compiled_layer_sees_loaded_weights() -> None:
    layer, other = StackedLinear(2, 16, 8), StackedLinear(2, 16, 8)
    rows = u4d_fast.quantize_rows(torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)))
    layer(rows)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(rows), layer(rows))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(compiled(rows), other(rows))


@torch.no_grad()
def test_adapters_stay_as_they_are_on_fp8_layers() -> None:
    model, inputs = random_transformer(), random_inputs()
    without = model(*inputs)
    add_lora(model, LoRAConfig(rank=2))
    for layer in lora_layers(model).values():
        layer.lora_B.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    truth = model(*inputs)
    u4d_fast.accelerate(model, precision="fp8")
    error = float(relative_error(model(*inputs), truth))
    assert 1e-5 < error < LARGEST_ERROR
    assert float(relative_error(without, truth)) > 10 * error


def test_fp8_compiles_in_one_graph() -> None:
    model, inputs = random_transformer(), random_inputs()
    u4d_fast.accelerate(model, precision="fp8")
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert float(relative_error(compiled(*inputs), model(*inputs))) < 1e-5


def test_gradients_in_fp8_are_refused() -> None:
    model = u4d_fast.accelerate(random_transformer(), precision="fp8")
    with pytest.raises(ValueError, match="no_grad"):
        model(*random_inputs())


def test_what_is_no_precision_or_has_none_is_refused() -> None:
    model = random_transformer()
    with pytest.raises(ValueError, match="precision: expected one of exact, fp8, fp8-linear, got 'int4'"):
        u4d_fast.accelerate(model, precision="int4")
    wan = small_wan()
    with pytest.raises(ValueError, match="precision: expected 'exact' for diffusers' WanTransformer3DModel"):
        u4d_fast.accelerate(wan, precision="fp8")
    assert u4d_fast.acceleration(wan).blocks == ()
