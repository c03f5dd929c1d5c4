"""Runs that begin with a checkpoint: adapters or all weights, resumed bit for bit, and never from another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import u4d
import u4d.train.loop as loop
from u4d.errors import UserError
from u4d.model.lora import lora_parameters
from u4d.model.lora_folder import load_lora
from u4d.train.loop import train
from u4d.train.recipe import FineTuning, Recipe, debug_run

RANK = 3
TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"


def fine_tuning(checkpoint: Path, rank: int | None) -> Recipe:
    return replace(debug_run(), start=FineTuning(str(checkpoint), rank))


def train_and_keep_the_first_save(recipe: Recipe, run: Path) -> Path:
    """Train; beside the run, in `halfway`, its folder stays as it was after the first save."""
    real = loop.save

    def save(out: Path, step: int, *parts: object) -> None:
        real(out, step, *parts)
        if step == recipe.save_every:
            shutil.copytree(out, out.with_name("halfway"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save)
        return train(recipe, run, workers=0, progress=False)


@pytest.fixture(scope="module")
def adapters(debug_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of adapters."""
    run = tmp_path_factory.mktemp("adapters") / "run"
    assert train_and_keep_the_first_save(fine_tuning(debug_checkpoint, RANK), run) == run / "adapter"
    return run


def test_a_run_of_adapters_leaves_an_adapter_and_no_checkpoint(adapters: Path, debug_checkpoint: Path) -> None:
    assert {part.name for part in adapters.iterdir()} == {"adapter", "log.jsonl", "recipe.json", "state.pt"}
    config = json.loads((adapters / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, RANK)
    assert config["base_model_name_or_path"] == str(debug_checkpoint)
    recipe = json.loads((adapters / "recipe.json").read_text())
    assert recipe["start"] == {"checkpoint": str(debug_checkpoint), "lora_rank": RANK}


def test_the_adapter_is_the_average_and_completes_scenes(adapters: Path, debug_checkpoint: Path) -> None:
    pipe = u4d.Pipeline.from_pretrained(debug_checkpoint)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    load_lora(pipe.transformer, adapters / "adapter")
    state = torch.load(adapters / "state.pt", weights_only=True)
    loaded = lora_parameters(pipe.transformer)
    assert set(loaded) == set(state["average"]) == set(state["model"])
    for name, parameter in loaded.items():
        assert torch.equal(parameter, state["average"][name]), name
        if "attn2" not in name:  # this checkpoint's null text is all zeros: its cross-attention learns nothing
            assert bool(parameter.any()), name
    assert all(torch.equal(pipe.transformer.state_dict()[name], tensor) for name, tensor in before.items())
    out = pipe.complete(u4d.Scene(rgb=torch.rand(6, 3, 32, 48)), steps=1)
    assert bool(torch.isfinite(out.depth).all())


def test_a_run_of_adapters_is_resumed_bit_for_bit(adapters: Path, debug_checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapters.with_name("halfway"), run)
    train(fine_tuning(debug_checkpoint, RANK), run, workers=0, progress=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "adapter" / name).read_bytes() == (adapters / "adapter" / name).read_bytes()
    whole, resumed = (torch.load(folder / "state.pt", weights_only=True) for folder in (adapters, run))
    first = torch.load(adapters.with_name("halfway") / "state.pt", weights_only=True)
    assert whole["step"] == resumed["step"] > first["step"]
    for part in ("model", "average"):
        assert all(torch.equal(tensor, resumed[part][name]) for name, tensor in whole[part].items())
        assert not all(torch.equal(tensor, first[part][name]) for name, tensor in whole[part].items())
    assert len(whole["optim"]["state"]) <= len(whole["model"])


def test_all_weights_are_fine_tuned_from_where_they_were(debug_checkpoint: Path, tmp_path: Path) -> None:
    """The codec stays, the transformer moves a little, and a stopped run ends like one never stopped."""
    recipe, run = fine_tuning(debug_checkpoint, None), tmp_path / "run"
    assert train_and_keep_the_first_save(recipe, run) == run / "checkpoint"
    old, new = (u4d.Pipeline.from_pretrained(folder) for folder in (debug_checkpoint, run / "checkpoint"))
    for name, tensor in old.vae.state_dict().items():
        assert torch.equal(new.vae.state_dict()[name], tensor.to(torch.bfloat16).float()), name
    assert torch.equal(new.statistics.mean, old.statistics.mean)
    state = torch.load(run / "state.pt", weights_only=True)["model"]
    assert set(state) == set(old.transformer.state_dict())
    before = old.transformer.state_dict()["blocks.0.ffn.net.2.weight"]
    moved = float((state["blocks.0.ffn.net.2.weight"] - before).norm() / before.norm())
    assert 1e-4 < moved < 1e-2
    train(recipe, tmp_path / "halfway", workers=0, progress=False)
    mine, theirs = (load_file(tmp_path / name / "checkpoint" / TRANSFORMER) for name in ("run", "halfway"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def other_layers(recipe: Recipe) -> Recipe:
    return replace(recipe, preset=replace(recipe.preset, transformer=replace(recipe.preset.transformer, num_layers=3)))


def other_size(recipe: Recipe) -> Recipe:
    sizes = replace(recipe.preset.transformer, image_size=(48, 32))
    return replace(recipe, preset=replace(recipe.preset, transformer=sizes))


def other_codec(recipe: Recipe) -> Recipe:
    assert recipe.preset.codec is not None
    return replace(recipe, preset=replace(recipe.preset, codec=replace(recipe.preset.codec, hidden=9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_layers, "num_layers: expected 3 as in the recipe's preset, got 2"),
        (other_size, r"image_size: expected \(48, 32\) .* got \(32, 48\)"),
        (other_codec, "hidden: expected 9 .* got 8"),
        (lambda recipe: replace(recipe, start=FineTuning("nothing here", 4)), "nothing here"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    change: Callable[[Recipe], Recipe], message: str, debug_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(change(fine_tuning(debug_checkpoint, RANK)), tmp_path / "run", workers=0, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_another_codec_is_refused(debug_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(debug_checkpoint, checkpoint)
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKLWan"]}))
    with pytest.raises(UserError, match=r"model_index\.json: component 'vae': expected a TinyCodec, got .*KLWan"):
        train(fine_tuning(checkpoint, RANK), tmp_path / "run", workers=0, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_from_another_checkpoint(adapters: Path, debug_checkpoint: Path, tmp_path: Path) -> None:
    """The same folder, but its weights were replaced since the run began."""
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    shutil.copytree(debug_checkpoint, checkpoint)
    recipe = fine_tuning(checkpoint, RANK)
    train_and_keep_the_first_save(recipe, run)
    tensors = load_file(checkpoint / TRANSFORMER)
    tensors["blocks.0.attn1.to_q.weight"][3, 0, 0] += 0.5
    save_file(tensors, checkpoint / TRANSFORMER, metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds other weights now"):
        train(recipe, tmp_path / "halfway", workers=0, progress=False)
    with pytest.raises(UserError, match="another recipe"):
        train(fine_tuning(debug_checkpoint, RANK + 1), adapters, workers=0, progress=False)
