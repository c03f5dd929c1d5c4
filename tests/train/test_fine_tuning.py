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
from convert.wan_folders import write_wan_folder
from train.runs import losses, same_bits, saved, train, train_until
from u4d.convert import init_from_wan
from u4d.errors import UserError
from u4d.model.lora import lora_parameters
from u4d.model.lora_folder import load_lora
from u4d.model.wan_codec import as_codec
from u4d.presets import Preset, TransformerConfig, read_config
from u4d.train.codec import channel_weights
from u4d.train.recipe import FineTuning, Recipe, debug_run

RANK = 3
TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"


def fine_tuning(checkpoint: Path, rank: int | None) -> Recipe:
    return replace(debug_run(), start=FineTuning(str(checkpoint), rank))


@pytest.fixture(scope="module")
def adapters(debug_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of adapters; beside it, in `halfway`, one that was stopped after its first save."""
    folder = tmp_path_factory.mktemp("adapters")
    train_until(fine_tuning(debug_checkpoint, RANK), folder / "halfway", 3)
    assert train(fine_tuning(debug_checkpoint, RANK), folder / "run") == folder / "run" / "adapter"
    return folder / "run"


def test_a_run_of_adapters_leaves_an_adapter_and_no_checkpoint(adapters: Path, debug_checkpoint: Path) -> None:
    assert {part.name for part in adapters.iterdir()} - {"tensorboard"} == {
        "adapter",
        "log.jsonl",
        "recipe.json",
        "state",
    }
    config = json.loads((adapters / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, RANK)
    assert config["base_model_name_or_path"] == str(debug_checkpoint)
    recipe = json.loads((adapters / "recipe.json").read_text())
    assert recipe["start"] == {"checkpoint": str(debug_checkpoint), "lora_rank": RANK}


def test_the_adapter_is_the_average_and_completes_scenes(adapters: Path, debug_checkpoint: Path) -> None:
    pipe = u4d.Pipeline.from_pretrained(debug_checkpoint)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    load_lora(pipe.transformer, adapters / "adapter")
    state = saved(adapters)
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
    first = saved(run)
    train(fine_tuning(debug_checkpoint, RANK), run)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "adapter" / name).read_bytes() == (adapters / "adapter" / name).read_bytes()
    whole, resumed = saved(adapters), saved(run)
    assert same_bits(whole, resumed) and not same_bits(whole, first)
    assert len(whole["optimizer"]["state"]) <= len(whole["model"])


def test_all_weights_are_fine_tuned_from_where_they_were(debug_checkpoint: Path, tmp_path: Path) -> None:
    """The codec stays, the transformer moves a little, and a stopped run ends like one never stopped."""
    recipe, run = fine_tuning(debug_checkpoint, None), tmp_path / "run"
    assert train(recipe, run) == run / "checkpoint"
    old, new = (u4d.Pipeline.from_pretrained(folder) for folder in (debug_checkpoint, run / "checkpoint"))
    for name, tensor in old.vae.state_dict().items():
        assert torch.equal(new.vae.state_dict()[name], tensor.to(torch.bfloat16).float()), name
    assert torch.equal(new.statistics.mean, old.statistics.mean)
    state = saved(run)["model"]
    assert set(state) == set(old.transformer.state_dict())
    before = old.transformer.state_dict()["blocks.0.ffn.net.2.weight"]
    moved = float((state["blocks.0.ffn.net.2.weight"] - before).norm() / before.norm())
    assert 1e-4 < moved < 1e-2
    train_until(recipe, tmp_path / "stopped", 3)
    train(recipe, tmp_path / "stopped")
    mine, theirs = (load_file(tmp_path / name / "checkpoint" / TRANSFORMER) for name in ("run", "stopped"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module")
def wan_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Wan2.1 of random weights, made into a four-stream checkpoint of small clips."""
    folder = tmp_path_factory.mktemp("wan")
    write_wan_folder(folder / "wan")
    init_from_wan(folder / "wan", folder / "u4d", torch.float32, num_frames=6, image_size=(32, 48))
    return folder / "u4d"


def from_wan(checkpoint: Path, rank: int | None) -> Recipe:
    """The recipe in the sizes of a checkpoint with Wan's VAE."""
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    sizes = read_config(TransformerConfig, config)
    return replace(fine_tuning(checkpoint, rank), preset=Preset("small-wan", sizes, codec=None))


@pytest.mark.parametrize("rank", [None, RANK])
def test_a_checkpoint_with_wans_vae_is_trained(rank: int | None, wan_checkpoint: Path, tmp_path: Path) -> None:
    recipe, run = from_wan(wan_checkpoint, rank), tmp_path / "run"
    result = train(recipe, run)
    assert bool(torch.isfinite(losses(run)).all()) and bool((losses(run) > 0).any(0).all())
    if rank is None:
        pipe = u4d.Pipeline.from_pretrained(result)
    else:
        pipe = u4d.Pipeline.from_pretrained(wan_checkpoint)
        pipe.load_lora(result)
        learnt = lora_parameters(pipe.transformer)["blocks.0.attn2.to_q.lora_B"]
        assert bool(learnt.any())  # the null text has a key for its padding, too
    out = pipe.complete(u4d.Scene(rgb=torch.rand(6, 3, 32, 48)), steps=1)
    assert bool(torch.isfinite(out.depth).all())
    train_until(recipe, tmp_path / "stopped", 3)
    train(recipe, tmp_path / "stopped")
    assert same_bits(saved(run), saved(tmp_path / "stopped"))


def test_wans_vae_weighs_all_channels_alike(wan_checkpoint: Path, debug_checkpoint: Path) -> None:
    pipe, tiny = (u4d.Pipeline.from_pretrained(folder) for folder in (wan_checkpoint, debug_checkpoint))
    assert torch.equal(channel_weights(as_codec(pipe.vae), pipe.statistics), torch.ones(4, 16))
    assert len(channel_weights(as_codec(tiny.vae), tiny.statistics).unique()) > 16


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
        train(change(fine_tuning(debug_checkpoint, RANK)), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_another_kind_of_codec_is_refused(
    wan_checkpoint: Path, debug_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = from_wan(wan_checkpoint, None)
    own = replace(recipe, preset=replace(recipe.preset, codec=debug_run().preset.codec))
    with pytest.raises(UserError, match="vae: expected TinyCodec as in the recipe's preset, got AutoencoderKLWan"):
        train(own, tmp_path / "run")
    own = fine_tuning(debug_checkpoint, None)
    with pytest.raises(UserError, match="vae: expected AutoencoderKLWan as in the recipe's preset, got TinyCodec"):
        train(replace(own, preset=replace(own.preset, codec=None)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_from_another_checkpoint(adapters: Path, debug_checkpoint: Path, tmp_path: Path) -> None:
    """The same folder, but its weights were replaced since the run began."""
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    shutil.copytree(debug_checkpoint, checkpoint)
    recipe = fine_tuning(checkpoint, RANK)
    train_until(recipe, run, 3)
    tensors = load_file(checkpoint / TRANSFORMER)
    tensors["blocks.0.attn1.to_q.weight"][3, 0, 0] += 0.5
    save_file(tensors, checkpoint / TRANSFORMER, metadata={"format": "pt"})
    with pytest.raises(UserError, match="this state belongs to another run: checkpoint: expected"):
        train(recipe, run)
    with pytest.raises(UserError, match="another recipe"):
        train(fine_tuning(debug_checkpoint, RANK + 1), adapters)
