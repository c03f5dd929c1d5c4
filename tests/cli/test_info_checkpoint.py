"""`u4d info CHECKPOINT`: what it is, from headers and configurations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from in_process import Command

from convert.original_files import write_original_folder
from convert.wan_folders import write_wan_folder
from u4d.convert import init_from_wan
from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig, read_config

SHARD = "transformer/diffusion_pytorch_model-00002-of-0000"


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Wan pipeline in float32; do not change it."""
    return write_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture(scope="module")
def made(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-stream checkpoint in several shards; do not change it."""
    return init_from_wan(wan, tmp_path_factory.mktemp("made") / "u4d", shard_bytes=100_000).out


@pytest.fixture(autouse=True)
def no_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for loader in ("from_pretrained", "load_state_dict"):
        monkeypatch.setattr(Transformer, loader, lambda *arguments, **options: pytest.fail("weights were loaded"))


def facts_of(u4d: Command, *arguments: object) -> dict[str, str]:
    outcome = u4d("info", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    pairs = (line.partition("  ") for line in outcome.out.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def test_a_checkpoint_made_from_wan(u4d: Command, made: Path, wan: Path) -> None:
    facts = facts_of(u4d, made)
    weights = list((made / "transformer").glob("*.safetensors"))
    megabytes = sum(file.stat().st_size for file in weights) / 1e6
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in Transformer(config_of(made)).parameters())
    expected = {
        "kind": "a u4d checkpoint",
        "origin": f"Wan2.1 transformer from {wan} (diffusers layout)",
        "streams": "rgb depth ray_dir ray_moment",
        "sizes": "2 layers, hidden 24, 2 heads of 12, ffn 40, text 16",
        "parameters": f"{parameters / 1e3:.4g} k: {parameters / 4e3:.4g} k per stream",
        "dtype": "bfloat16 (59 tensors), float32 (11 tensors)",
        "weights": f"{len(weights)} files, {megabytes:.1f} MB",
        "clip": "50 frames of 240x320",
        "latents rgb": "mean -0.046, deviation 1.125 to 3.269",
        "latents ray_moment": "mean 0.000, deviation 0.030 to 0.108",
        "reference camera": "field of view 1.142 rad",
        "ray basis": "frames",
        "null text": "stored, then 511 zero rows",
        "recommended": "where all RGB is observed: steps 40, guidance 2",
        "folder": str(made),
    }
    assert len(weights) > 1
    assert facts.items() >= expected.items()
    assert facts["vae"].startswith("AutoencoderKLWan, 1 file") and facts["text encoder"].startswith("UMT5EncoderModel")


def config_of(folder: Path) -> TransformerConfig:
    return read_config(TransformerConfig, json.loads((folder / "transformer/config.json").read_text()))


def test_the_shipped_checkpoint(u4d: Command) -> None:
    facts = facts_of(u4d, "tiny")
    assert facts["kind"] == "a u4d checkpoint" and facts["clip"] == "18 frames of 96x128"
    assert facts["options"] == "motion_features, rgb_to_geometry" and "beside them" in facts["parameters"]
    assert facts["null text"] == "zeros" and facts["text encoder"].startswith("none")
    assert facts["vae"].startswith("TinyCodec") and facts["recommended"].endswith(
        "steps 1, guidance 1; predicted camera paths smoothed over 2 frames"
    )


def test_a_transformer_alone(u4d: Command, made: Path, tmp_path: Path) -> None:
    facts = facts_of(u4d, made / "transformer")
    assert facts["kind"].startswith("a u4d transformer alone") and facts["streams"].startswith("rgb depth")
    assert "vae" not in facts
    shutil.copytree(made / "transformer", tmp_path / "part/transformer")
    assert facts_of(u4d, tmp_path / "part")["kind"] == facts["kind"]


def test_a_wan_checkpoint_and_what_to_do_with_it(u4d: Command, wan: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    facts = facts_of(u4d, wan)
    assert facts["kind"] == "a Wan2.1 checkpoint (diffusers layout), of one stream"
    assert facts["next"] == f"u4d init --from {wan} -o OUT makes a u4d checkpoint of it"
    assert facts["dtype"] == "float32 (69 tensors)" and facts["with it"] == "vae, text encoder"
    release = write_original_folder(tmp_path, WanTransformer3DModel.from_pretrained(wan / "transformer"))
    original = facts_of(u4d, release)
    assert original["kind"] == "a Wan2.1 checkpoint (original release), of one stream"
    assert original["parameters"] == facts["parameters"] and original["with it"] == "nothing else"


def test_statistics_that_are_not_there_are_told(u4d: Command, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "transformer", tmp_path / "transformer")
    config_file = tmp_path / "transformer/config.json"
    config = json.loads(config_file.read_text()) | {"latents_mean": None, "origin": ""}
    config_file.write_text(json.dumps(config))
    facts = facts_of(u4d, tmp_path)
    assert "not trained" in facts["latents"] and facts["origin"] == "not told"


def test_a_downloaded_hub_id_is_found_without_the_network(
    u4d: Command, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(repo: str, local_files_only: bool, **options: object) -> str:
        assert local_files_only
        if repo != "owner/here":
            raise OSError("not in the cache")
        return str(made)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert facts_of(u4d, "owner/here")["kind"] == "a u4d checkpoint"
    outcome = u4d("info", "owner/gone")
    assert outcome.code == 2 and "hf download owner/gone" in outcome.err


def test_damage_is_told(u4d: Command, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "u4d")
    (shard,) = (tmp_path / "u4d").glob(f"{SHARD}*")
    shard.write_bytes(shard.read_bytes()[:-4])
    for place, words in (
        (tmp_path / "u4d", [shard.name, "cut short"]),
        (tmp_path / "u4d/transformer", [shard.name, "cut short"]),
        (tmp_path / "nothing", ["no such file or folder"]),
        (tmp_path, ["got a folder with none of"]),
    ):
        outcome = u4d("info", place)
        (line,) = outcome.err.splitlines()
        assert outcome.code == 2 and outcome.out == "" and all(word in line for word in words), line
