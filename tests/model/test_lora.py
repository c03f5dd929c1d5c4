"""Adapters in the model: what they change, what they leave alone, and what is trained."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lora_samples import CONFIG, INPUTS, adapted, output
from model_samples import own_stream_mask, random_transformer, relative_error, small_config

from u4d.errors import UserError
from u4d.model.lora import (
    TARGETS,
    LoRAConfig,
    LoRALinear,
    add_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
)
from u4d.model.stacked import StackedLinear
from u4d.model.transformer import Transformer
from u4d.presets import wan_1_3b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_nothing(dtype: torch.dtype) -> None:
    model = random_transformer().to(dtype=dtype)
    before = output(model, dtype)
    add_lora(model, CONFIG)
    # Not bit for bit: a plain layer is fused with what follows it, and so rounds once less.
    assert relative_error(output(model, dtype), before) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}


def test_adapters_are_what_lora_says() -> None:
    model = adapted(config=LoRAConfig(rank=3, alpha=4.5, targets=("blocks.1.ffn.net.2",)))
    ((name, layer),) = lora_layers(model).items()
    assert name == "blocks.1.ffn.net.2" and layer.lora_A.shape == (4, 3, 40) and layer.lora_B.shape == (4, 24, 3)
    x = torch.randn(4, 2, 5, 40)
    wide = {part: value.double() for part, value in layer.named_parameters()}
    weight = wide["weight"] + 1.5 * wide["lora_B"] @ wide["lora_A"]
    expected = torch.einsum("soi,sbti->sbto", weight, x.double()) + wide["bias"][:, None, None]
    assert relative_error(layer(x).detach().double(), expected.detach()) < 1e-6


def test_the_base_is_frozen_and_keeps_its_names() -> None:
    model = random_transformer()
    names = list(model.state_dict())
    add_lora(model, CONFIG)
    assert set(names) == set(model.state_dict()) - set(lora_parameters(model))
    model(*INPUTS).square().sum().backward()
    adapters = lora_parameters(model)
    assert len(adapters) == 2 * 2 * len(TARGETS)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in adapters) == (parameter.grad is not None), name
    # With B at zero, A can't matter yet.
    for name, parameter in adapters.items():
        assert bool(parameter.grad.any()) == name.endswith("lora_B"), name


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = adapted(), adapted()
    saving.train()
    saving.enable_gradient_checkpointing()
    for model in (plain, saving):
        model(*INPUTS).square().sum().backward()
    for (name, mine), theirs in zip(lora_parameters(plain).items(), lora_parameters(saving).values(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_a_bfloat16_base_trains_under_autocast() -> None:
    """As the training loop does: fp32 latents, frozen bf16 weights, fp32 adapters."""
    model = adapted()
    adapters = lora_parameters(model)
    kept = {name: parameter.detach().clone() for name, parameter in adapters.items()}
    truth = output(model)
    for name, parameter in model.named_parameters():
        if name not in adapters and not any(part in name for part in Transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(INPUTS[0], INPUTS[1], INPUTS[2])
    result.float().square().sum().backward()
    assert relative_error(result.detach().float(), truth) < 0.05
    for name, parameter in adapters.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert bool(torch.isfinite(parameter.grad).all()) and torch.equal(parameter, kept[name])


def test_training_adapters_reduces_a_loss() -> None:
    """Fit another model's output: the error falls clearly, by the adapters alone."""
    model, goal = random_transformer(), output(adapted())
    before = deepcopy(model.state_dict())
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(rank=4, alpha=4))
    optimizer = torch.optim.Adam(lora_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = (model(*INPUTS) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_merged_equals_unmerged() -> None:
    model = adapted()
    names = list(random_transformer().state_dict())
    apart = output(model)
    expected = {}
    for name, layer in lora_layers(model).items():
        weight, down, up = (part.detach().double() for part in (layer.weight, layer.lora_A, layer.lora_B))
        expected[f"{name}.weight"] = weight + 1.5 * up @ down
    assert relative_error(output(random_transformer()), apart) > 0.05, "the adapters must matter"
    merge_lora(model)
    assert relative_error(output(model), apart) < 1e-5
    assert list(model.state_dict()) == names and not lora_layers(model)
    for name, truth in expected.items():
        assert relative_error(model.get_parameter(name).detach().double(), truth) < 2e-7, name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merging_into_bfloat16_rounds_once() -> None:
    model = adapted().to(dtype=torch.bfloat16)
    expected = {name: layer.merged_weight().to(torch.bfloat16) for name, layer in lora_layers(model).items()}
    merge_lora(model)
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), weight), name


def test_a_model_whose_adapters_are_removed_is_as_before(tmp_path: Path) -> None:
    model, before = adapted(), random_transformer()
    remove_lora(model)
    assert [type(part) for part in model.modules()] == [type(part) for part in before.modules()]
    assert torch.equal(output(model), output(before))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(before.state_dict())
    assert torch.equal(output(loaded), output(before))


def test_parameters_are_taken_over_not_copied() -> None:
    model = random_transformer()
    weight = model.blocks[0].attn1.to_q.weight
    add_lora(model, CONFIG)
    assert isinstance(model.blocks[0].attn1.to_q, LoRALinear) and model.blocks[0].attn1.to_q.weight is weight
    remove_lora(model)
    assert type(model.blocks[0].attn1.to_q) is StackedLinear and model.blocks[0].attn1.to_q.weight is weight


def test_streams_have_adapters_of_their_own() -> None:
    """Where every stream sees only itself, changing stream 2's adapters changes stream 2 alone."""
    model = adapted()
    mask = own_stream_mask(2, 3)
    with torch.no_grad():
        before = model(*INPUTS, group_mask=mask)
        for parameter in lora_parameters(model).values():
            parameter[2] += 0.5
        after = model(*INPUTS, group_mask=mask)
    for stream in range(4):
        assert torch.equal(before[:, stream], after[:, stream]) == (stream != 2)


def test_a_target_may_be_a_kind_or_one_layer() -> None:
    model = random_transformer()
    add_lora(model, LoRAConfig(rank=1, targets=("to_q", "blocks.1.ffn.net.0.proj")))
    assert list(lora_layers(model)) == [
        "blocks.0.attn1.to_q",
        "blocks.0.attn2.to_q",
        "blocks.1.attn1.to_q",
        "blocks.1.attn2.to_q",
        "blocks.1.ffn.net.0.proj",
    ]


@pytest.mark.parametrize("target", ["norm_q", "attn1", "proj_out", "linear_1", "to_out", "o_q", ""])
def test_a_target_that_is_no_linear_layer_of_the_blocks_is_refused(target: str) -> None:
    model = random_transformer()
    with pytest.raises(UserError, match=r"targets: .* there are attn1\.to_q, .*, ffn\.net\.2"):
        add_lora(model, LoRAConfig(targets=("attn1.to_q", target)))
    assert not lora_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_are_added_once() -> None:
    model = adapted()
    with pytest.raises(UserError, match="merge_lora or remove_lora"):
        add_lora(model, CONFIG)
    remove_lora(model)
    for change in (merge_lora, remove_lora):
        with pytest.raises(UserError, match="got one without"):
            change(model)


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"rank": 0}, "rank"), ({"rank": 2.0}, "rank"), ({"alpha": float("nan")}, "alpha"), ({"targets": ()}, "targets")],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        LoRAConfig(**fields)


def test_adapters_of_the_full_model_are_small() -> None:
    """Rank 16 on all ten kinds of layers of `wan-1.3b`: 1.5 % of its parameters, 175 MB in bfloat16."""
    with torch.device("meta"):
        model = Transformer(wan_1_3b().transformer)
    total = sum(parameter.numel() for parameter in model.parameters())
    add_lora(model)
    parameters = lora_parameters(model).values()
    count = sum(parameter.numel() for parameter in parameters)
    attention, feed_forward = 8 * 2 * 1536, 2 * (1536 + 8960)
    assert count == 30 * 4 * 16 * (attention + feed_forward) == 87_490_560
    assert count / total < 0.016 and 2 * count < 175e6
    assert all(parameter.is_meta for parameter in parameters)


def test_adapters_take_all_kinds_of_linear_layers() -> None:
    model = Transformer(small_config(num_layers=1))
    linear = [name for name, part in model.blocks[0].named_modules() if isinstance(part, StackedLinear)]
    assert sorted(linear) == sorted(TARGETS)
