"""The pipeline with Wan's VAE and text encoder: what a checkpoint made by `u4d init` runs through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import nn

import u4d
from convert.wan_folders import SIZES, small_vae, write_wan_folder
from model.model_samples import randomise
from u4d.errors import UserError
from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig
from u4d.text_encoder import load_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-stream checkpoint with a Wan VAE and a text encoder, all small and random."""
    folder = tmp_path_factory.mktemp("checkpoint")
    text_parts = write_wan_folder(tmp_path_factory.mktemp("wan"))
    config = TransformerConfig(
        **SIZES,
        num_frames=6,
        image_size=(32, 48),
        text_length=512,
        latents_mean=((0.0,) * 16,) * 4,
        latents_std=((1.0,) * 16,) * 4,
    )
    tokenizer, encoder = load_text_encoder(text_parts, torch.float32)
    pipe = u4d.Pipeline(
        randomise(Transformer(config), seed=1),
        small_vae(),
        UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        encoder,
        tokenizer,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scene() -> u4d.Scene:
    return u4d.data.ProceduralScenes(split="test", frames=6, size=(32, 48))[5]


@pytest.fixture(scope="module")
def pipe(folder: Path) -> u4d.Pipeline:
    return u4d.Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("spec", ("rgb:all", "rgb:0,-1", "depth:1:5", "camera:all,rgb:0", "none"))
@pytest.mark.parametrize("frames", (1, 2, 6))
def test_completes(pipe: u4d.Pipeline, scene: u4d.Scene, spec: str, frames: int) -> None:
    if spec == "depth:1:5" and frames < 6:
        pytest.skip("such a group needs six frames")
    out = pipe.complete(scene.frames(range(frames)), observe=spec, steps=1)
    assert out.rgb.shape == (frames, 3, 32, 48) and out.depth.shape == (frames, 32, 48)
    for part in (out.rgb, out.depth, out.intrinsics, out.cam_to_world):
        assert bool(torch.isfinite(part).all())


def test_what_is_not_observed_is_never_looked_at(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    """Although the VAE is causal: it sees the nearest observed frames in place of the others."""
    other = u4d.data.ProceduralScenes(split="test", frames=6, size=(32, 48))[8]
    rgb = other.rgb.clone()
    rgb[1:5] = scene.rgb[1:5]
    mixed = u4d.Scene(rgb=rgb, depth=other.depth)
    one, two = (pipe.complete(given, observe="rgb:1:5", steps=1) for given in (scene, mixed))
    for name in ("rgb", "depth", "intrinsics", "cam_to_world"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_the_text_encoder_is_loaded_for_a_prompt_only(folder: Path, scene: u4d.Scene) -> None:
    pipe = u4d.Pipeline.from_pretrained(folder)
    assert pipe.text_encoder is None and pipe.text_folder == folder
    silent = pipe.complete(scene, steps=1)
    spoken = pipe.complete(scene, steps=1, prompt="a red car")
    assert pipe.text_encoder is None
    assert not torch.equal(silent.depth, spoken.depth)
    tokenizer, encoder = load_text_encoder(folder, torch.bfloat16)
    ready = u4d.Pipeline.from_pretrained(folder, text_encoder=encoder, tokenizer=tokenizer)
    assert torch.equal(ready.complete(scene, steps=1, prompt="a red car").depth, spoken.depth)


def test_a_prompt_without_a_text_encoder_is_refused(folder: Path, scene: u4d.Scene, tmp_path: Path) -> None:
    pipe = u4d.Pipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "silent")
    silent = u4d.Pipeline.from_pretrained(tmp_path / "silent")
    with pytest.raises(UserError, match="no text encoder"):
        silent.complete(scene, steps=1, prompt="a red car")


def test_large_models_are_loaded_in_bfloat16_and_the_vae_in_float32(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert u4d.Pipeline.from_pretrained(folder).transformer.dtype == torch.float32
    monkeypatch.setattr("u4d.checkpoint.LARGE_BYTES", 1000)
    pipe = u4d.Pipeline.from_pretrained(folder)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert pipe.transformer.blocks[0].norm2.weight.dtype == torch.float32
    assert u4d.Pipeline.from_pretrained(folder, vae_dtype=torch.float16).vae.dtype == torch.float16


def test_offload_never_has_two_parts_on_the_device(
    folder: Path, scene: u4d.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = u4d.Pipeline.from_pretrained(folder).complete(scene, steps=1, prompt="a red car")
    tokenizer, encoder = load_text_encoder(folder, torch.bfloat16)
    pipe = u4d.Pipeline.from_pretrained(folder, text_encoder=encoder, tokenizer=tokenizer)
    parts = {"text": pipe.text_encoder, "vae": pipe.vae, "transformer": pipe.transformer}
    moves: list[str] = []
    there: set[str] = set()

    def watch(name: str, part: nn.Module) -> None:
        def to(place: Any) -> nn.Module:
            # Both places are the CPU here, so they are told apart by how they are named: a device to work on, "cpu".
            (there.add if isinstance(place, torch.device) else there.discard)(name)
            moves.append(f"{name} {'comes' if name in there else 'goes'}")
            assert len(there) <= 1
            return part

        monkeypatch.setattr(part, "to", to)

    pipe.enable_offload("cpu")
    for name, part in parts.items():
        watch(name, part)
        part.register_forward_pre_hook(lambda *_, name=name: pytest.fail(name) if name not in there else None)
    out = pipe.complete(scene, steps=1, prompt="a red car")
    order = ("text", "vae", "transformer", "vae")
    assert moves == [f"{name} {what}" for name in order for what in ("comes", "goes")]
    for name in ("rgb", "depth", "cam_to_world"):
        assert torch.equal(getattr(out, name), getattr(truth, name)), name
