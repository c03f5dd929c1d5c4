"""Adapters on disk: ours and peft's are the same thing, and whatever does not fit is told before anything changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from lora_samples import CONFIG, INPUTS, adapted, output
from model_samples import own_stream_mask, random_transformer, relative_error
from safetensors.torch import load_file, save_file

from u4d.diffusion.flow import STREAMS
from u4d.errors import UserError
from u4d.model.lora import LoRAConfig, lora_layers, lora_parameters, merge_lora
from u4d.model.lora_folder import export_stream_lora, load_lora, save_lora


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Adapters of every kind of layer, as we save them."""
    save_lora(adapted(), tmp_path / "adapter", base="tiny")
    return tmp_path / "adapter"


def test_save_and_load_bit_for_bit(folder: Path) -> None:
    model, saved = random_transformer(), adapted()
    load_lora(model, folder)
    assert torch.equal(output(model), output(saved))
    for (name, mine), (other, theirs) in zip(
        lora_parameters(model).items(), lora_parameters(saved).items(), strict=True
    ):
        assert name == other and torch.equal(mine, theirs), name
    assert next(iter(lora_layers(model).values())).config == CONFIG
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    save_lora(model, folder.with_name("again"), base="tiny")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder.with_name("again") / name).read_bytes() == (folder / name).read_bytes()


def test_scale_is_the_strength_of_the_update(folder: Path) -> None:
    half, none, merged = (random_transformer() for _ in range(3))
    load_lora(half, folder, scale=0.5)
    load_lora(none, folder, scale=0)
    load_lora(merged, folder)
    merge_lora(merged)
    torch.testing.assert_close(output(none), output(random_transformer()))
    base, whole = random_transformer(), merged
    for name, layer in lora_layers(half).items():
        middle = (base.get_parameter(f"{name}.weight") + whole.get_parameter(f"{name}.weight")) / 2
        assert torch.allclose(layer.merged_weight(), middle, atol=1e-6)
    save_lora(half, folder.with_name("half"))
    again = random_transformer()
    load_lora(again, folder.with_name("half"))
    assert torch.equal(output(again), output(half))


def test_half_precision_files_load(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file)
    model = random_transformer()
    load_lora(model, folder)
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}
    assert relative_error(output(model), output(adapted())) < 0.02


def test_an_adapter_is_replaced_but_nothing_else_is(folder: Path) -> None:
    (folder / "README.md").write_text("peft writes one")
    save_lora(adapted(config=LoRAConfig(rank=1)), folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 1
    assert [part.name for part in folder.parent.iterdir()] == ["adapter"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files there"):
        save_lora(adapted(), folder)
    assert (folder / "notes.txt").read_text() == "mine"


# --- peft ------------------------------------------------------------------------------------------------------------


def test_peft_loads_what_we_save(folder: Path) -> None:
    expected = output(adapted())
    assert relative_error(output(random_transformer()), expected) > 0.05
    wrapped = peft.PeftModel.from_pretrained(random_transformer(), folder)
    assert relative_error(output(wrapped), expected) < 1e-5
    merged = wrapped.merge_and_unload()
    assert relative_error(output(merged), expected) < 1e-5


def test_peft_injects_what_we_save(folder: Path) -> None:
    model = random_transformer()
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(folder), model)
    tensors = load_file(folder / "adapter_model.safetensors")
    missed = peft.set_peft_model_state_dict(
        model, {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    )
    assert not missed.unexpected_keys
    assert relative_error(output(model), output(adapted())) < 1e-5


@pytest.mark.parametrize("by_root", [False, True])
def test_we_load_what_peft_saves(by_root: bool, tmp_path: Path) -> None:
    """Trained for two steps by peft, on some of the layers."""
    targets = ["attn1.to_q.weight", "to_out.0.weight", "blocks.1.ffn.net.0.proj.weight"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=by_root, target_modules=[], target_parameters=targets, lora_dropout=0.0
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(random_transformer(), config)
    optimizer = torch.optim.Adam((part for part in wrapped.parameters() if part.requires_grad), lr=0.1)
    for _ in range(2):
        wrapped(*INPUTS).square().mean().backward()
        optimizer.step()
    wrapped.save_pretrained(tmp_path)
    model = random_transformer()
    load_lora(model, tmp_path)
    assert len(lora_layers(model)) == 2 * 3 + 1
    assert relative_error(output(random_transformer()), output(model)) > 0.05
    assert relative_error(output(wrapped), output(model)) < 1e-5


@pytest.mark.parametrize("stream", ["rgb", "ray_dir"])
def test_a_stream_is_an_ordinary_lora_of_wan(stream: str, tmp_path: Path) -> None:
    """diffusers and peft load it on Wan's transformer, which then computes what that stream does alone."""
    model = adapted()
    export_stream_lora(model, tmp_path / "lora", stream)
    index, frames = STREAMS.index(stream), 3
    latents, times, text = INPUTS
    with torch.no_grad():
        ours = model(latents, times, text, group_mask=own_stream_mask(2, frames))[:, index]
        tokens = 1000 * times[:, index].repeat_interleave(latents[0, 0, 0, 0].numel() // 4, dim=1)
    config = model.config

    def wan() -> diffusers.WanTransformer3DModel:
        plain = diffusers.WanTransformer3DModel(
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            ffn_dim=config.ffn_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
        )
        names = plain.state_dict()
        base = random_transformer().state_dict()
        plain.load_state_dict({name: base[name][index] for name in names})
        return plain.eval()

    by_diffusers = wan()
    by_diffusers.load_lora_adapter(
        tmp_path / "lora", weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    by_peft = peft.PeftModel.from_pretrained(wan(), tmp_path / "lora")
    for reader in (by_peft, by_diffusers):
        with torch.no_grad():
            theirs = reader(latents[:, index], tokens, text, return_dict=False)[0]
        assert relative_error(theirs, ours) < 1e-4


# --- what is refused -------------------------------------------------------------------------------------------------


def change_field(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


A0 = "base_model.model.blocks.0.attn1.to_q.lora_A.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), r"found no adapter_config\.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"found no adapter_model\.safe"),
    "a pickle": (lambda folder: (folder / "adapter_model.bin").touch(), r"adapter_model\.bin: only safetensors"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), r"adapter_config\.json: can't be"),
    "cut short": (cut_short, r"adapter_model\.safetensors: missing, damaged or cut short"),
    "missing": (change_tensors(lambda tensors: tensors.pop(A0)), rf"{A0}' is missing"),
    "unknown": (change_tensors(lambda tensors: tensors.update(x=torch.zeros(1))), "'x' belongs to no layer"),
    "three streams": (
        change_tensors(lambda tensors: tensors.update({A0: torch.zeros(9, 24)})),
        rf"{A0}': expected \[12, 24\] \(the rank .* 4 streams; .*\), got \[9, 24\]",
    ),
    "another width": (
        change_tensors(lambda tensors: tensors.update({A0: torch.zeros(12, 32)})),
        r"expected \[12, 24\] .* got \[12, 32\]",
    ),
    "NaN": (change_tensors(lambda tensors: tensors[A0].fill_(torch.nan)), rf"{A0}': expected finite"),
    "integers": (change_tensors(lambda tensors: tensors.update({A0: tensors[A0].int()})), rf"{A0}': .* got I32"),
    "another rank": (change_field("r", 4), r"expected \[16, 24\]"),
    "no rank": (change_field("r", None), "'r': expected a positive whole number, got null"),
    "true as a rank": (change_field("r", True), "'r'"),
    "endless alpha": (change_field("lora_alpha", float("inf")), "'lora_alpha': expected a finite number"),
    "another method": (change_field("peft_type", "LOHA"), '\'peft_type\': expected "LORA", got "LOHA"'),
    "DoRA": (change_field("use_dora", True), "'use_dora': this option of peft is not supported"),
    "ranks by layer": (change_field("rank_pattern", {"to_q": 4}), "'rank_pattern'"),
    "alphas by layer": (change_field("alpha_pattern", {"to_q": 4}), "'alpha_pattern'"),
    "biases": (change_field("bias", "all"), '\'bias\': expected "none", got "all"'),
    "saved modules": (change_field("modules_to_save", ["proj_out"]), "'modules_to_save'"),
    "PiSSA": (change_field("init_lora_weights", "pissa"), "'init_lora_weights'"),
    "an option of the future": (change_field("use_magic", True), "'use_magic'"),
    "old peft": (change_field("peft_version", "0.19.1"), "'peft_version': expected 0.20 or newer"),
    "unknown peft": (change_field("peft_version", None), "'peft_version'"),
    "Wan's LoRA": (change_field("target_modules", ["to_q"]), "'target_modules': .* got \\[\"to_q\"\\]"),
    "a norm": (change_field("target_parameters", ["attn1.norm_q.weight"]), "'target_parameters': .*norm_q.* there are"),
    "a bias": (change_field("target_parameters", ["attn1.to_q.bias"]), "'target_parameters': expected weights"),
    "no targets": (change_field("target_parameters", None), "'target_parameters': expected weights"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_and_nothing_changes(name: str, folder: Path) -> None:
    damage, message = WRONG[name]
    damage(folder)
    model = random_transformer()
    with pytest.raises(UserError, match=message) as caught:
        load_lora(model, folder)
    assert str(folder) in str(caught.value)
    assert not lora_layers(model) and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(output(model), output(random_transformer()))


def test_adapters_of_another_model_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"blocks\.2\..* is missing"):
        load_lora(random_transformer(num_layers=3), folder)
    with pytest.raises(UserError, match=r"expected \[48, 12\].* got \[40, 12\]"):
        load_lora(random_transformer(ffn_dim=48), folder)


def test_adapters_are_not_loaded_over_others(folder: Path) -> None:
    model = random_transformer()
    load_lora(model, folder)
    with pytest.raises(UserError, match="merge_lora or remove_lora them first"):
        load_lora(model, folder)
    with pytest.raises(UserError, match="scale"):
        load_lora(random_transformer(), folder, scale=float("nan"))
    with pytest.raises(UserError, match="nowhere"):
        load_lora(random_transformer(), "nowhere")


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    for write in (save_lora, export_stream_lora):
        with pytest.raises(UserError, match="got one without"):
            write(random_transformer(), tmp_path / "adapter")
    with pytest.raises(UserError, match="stream: expected one of rgb"):
        export_stream_lora(adapted(), tmp_path / "adapter", "colour")
    assert not list(tmp_path.iterdir())
