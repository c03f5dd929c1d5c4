"""Sources that are refused: another model, a damaged file, a pickle. File, field and tensor are named."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.original_files import original_tensors, write_original_folder
from convert.wan_folders import write_wan_folder
from u4d.convert import init_from_wan
from u4d.convert.source import open_source
from u4d.errors import UserError

Change = Callable[[Path], object]
FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"
QUERY = "blocks.1.attn1.to_q.weight"


@pytest.fixture
def copied(wan: Path, tmp_path: Path) -> Path:
    """A whole Wan pipeline to damage."""
    return Path(shutil.copytree(wan, tmp_path / "wan"))


@pytest.fixture
def release(wan: Path, tmp_path: Path) -> Path:
    """The same transformer as the original release stores it, to damage."""
    return write_original_folder(tmp_path / "release", WanTransformer3DModel.from_pretrained(wan / "transformer"))


def edit_json(path: str, **changes: object) -> Change:
    def change(folder: Path) -> None:
        (folder / path).write_text(json.dumps(json.loads((folder / path).read_text()) | changes))

    return change


def edit_tensors(path: str, edit: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / path)
        edit(tensors)
        save_file(tensors, folder / path)

    return change


def cut(path: str, length: int) -> Change:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:length])


def remove(path: str) -> Change:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def rename(path: str, name: str) -> Change:
    return lambda folder: (folder / path).rename(folder / path.replace(Path(path).name, name))


def refused(source: Path, out: Path, message: str) -> str:
    """The error, after checks that it is one line and that nothing was written."""
    with pytest.raises(UserError, match=message) as caught:
        init_from_wan(source, out)
    assert len(str(caught.value).splitlines()) == 1 and not out.exists()
    return str(caught.value)


DAMAGES: dict[str, tuple[Change, str]] = {
    "image-to-video": (
        edit_json(CONFIG, in_channels=36),
        rf"{CONFIG}: in_channels: expected 16, got 36; take a text",
    ),
    "image embeddings": (edit_json(CONFIG, image_dim=1280), rf"{CONFIG}: image_dim: expected None, got 1280"),
    "image keys": (edit_json(CONFIG, added_kv_proj_dim=64), rf"{CONFIG}: added_kv_proj_dim: expected None, got 64"),
    "first and last frame": (edit_json(CONFIG, pos_embed_seq_len=514), rf"{CONFIG}: pos_embed_seq_len: expected None"),
    "another norm": (edit_json(CONFIG, qk_norm="rms_norm"), rf"{CONFIG}: qk_norm: expected 'rms_norm_across_heads'"),
    "no norm before text": (edit_json(CONFIG, cross_attn_norm=False), rf"{CONFIG}: cross_attn_norm: expected True"),
    "another patch": (
        edit_json(CONFIG, patch_size=[1, 4, 4]),
        rf"{CONFIG}: patch_size: expected \(1, 2, 2\), got \[1",
    ),
    "another epsilon": (edit_json(CONFIG, eps=1e-5), rf"{CONFIG}: eps: expected 1e-06, got 1e-05"),
    "other latents": (edit_json(CONFIG, out_channels=48), rf"{CONFIG}: out_channels: expected 16, got 48"),
    "VACE": (edit_json(CONFIG, _class_name="WanVACETransformer3DModel"), rf"{CONFIG}: _class_name: expected Wan.*VACE"),
    "no class": (edit_json(CONFIG, _class_name=None), rf"{CONFIG}: _class_name: expected .* got None"),
    "our own class": (edit_json(CONFIG, _class_name="Transformer"), rf"{CONFIG}: this is a u4d checkpoint already"),
    "unknown field": (edit_json(CONFIG, num_experts=8), rf"{CONFIG}: unknown field 'num_experts'; known are"),
    "quantised": (edit_json(CONFIG, quantization_config={}), rf"{CONFIG}: unknown field 'quantization_config'"),
    "a size without sense": (edit_json(CONFIG, num_layers="two"), rf"{CONFIG}: "),
    "another size": (edit_json(CONFIG, num_layers=3), rf"{WEIGHTS}: tensor 'blocks.2.*' is missing"),
    "no configuration": (remove(CONFIG), rf"{CONFIG}: can't be read as JSON"),
    "no weights": (remove(WEIGHTS), rf"{WEIGHTS}: missing, damaged or cut short"),
    "weights cut short": (cut(WEIGHTS, 50_000), rf"{WEIGHTS}: missing, damaged or cut short"),
    "tensor missing": (edit_tensors(WEIGHTS, lambda t: t.pop(QUERY)), rf"{WEIGHTS}: tensor '{QUERY}' is missing"),
    "tensor too many": (
        edit_tensors(WEIGHTS, lambda t: t.update(surprise=torch.zeros(1))),
        rf"{WEIGHTS}: tensor 'surprise' is not known to WanTransformer3DModel",
    ),
    "another shape": (
        edit_tensors(WEIGHTS, lambda t: t.update({QUERY: t[QUERY][:3].clone()})),
        rf"{WEIGHTS}: tensor '{QUERY}': expected \[24, 24\], got \[3, 24\]",
    ),
    "another precision": (
        edit_tensors(WEIGHTS, lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)})),
        rf"{WEIGHTS}: tensor '{QUERY}': expected float32, bfloat16 or float16, got F8_E4M3",
    ),
    "pickled transformer": (
        rename(WEIGHTS, "diffusion_pytorch_model.bin"),
        r"transformer/diffusion_pytorch_model.bin: only safetensors are read.*python -c",
    ),
    "pickled VAE": (
        rename("vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.pth"),
        r"vae/diffusion_pytorch_model.pth: only safetensors are read",
    ),
    "pickled text encoder": (
        rename("text_encoder/model.safetensors", "pytorch_model.bin"),
        r"text_encoder/pytorch_model.bin: only safetensors are read.*text_encoder/model.safetensors$",
    ),
    "another VAE": (edit_json("vae/config.json", z_dim=48), r"vae/config.json: z_dim: expected 16, got 48"),
    "VAE of another class": (
        edit_json("vae/config.json", _class_name="AutoencoderKL"),
        r"vae/config.json: _class",
    ),
    "unknown field of the VAE": (edit_json("vae/config.json", stride=4), r"vae/config.json: unknown field 'stride'"),
    "VAE of another kind": (
        edit_json("vae/config.json", is_residual=True),
        r"vae/config.json: is_residual: expected",
    ),
    "statistics of the VAE": (
        edit_json("vae/config.json", latents_std=[1.0]),
        r"vae/config.json: latents_std: exp",
    ),
    "VAE cut short": (cut("vae/diffusion_pytorch_model.safetensors", 9000), r"vae/.*: missing, damaged or cut short"),
    "VAE not downloaded": (remove("vae"), r"model_index.json: expected a folder vae/ beside it, found none"),
    "text encoder cut short": (
        cut("text_encoder/model.safetensors", 9000),
        r"text_encoder/model.safetensors: missing",
    ),
    "text of another width": (
        edit_json("text_encoder/config.json", d_model=8),
        r"d_model: expected .* 16",
    ),
    "two stages": (
        edit_json("model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
        r"model_index.json: expected a folder transformer_2/",
    ),
    "a u4d checkpoint": (edit_json("model_index.json", _class_name="Pipeline"), r"expected a Wan pipeline.*--extract"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(copied: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(copied)
    assert str(copied) in refused(copied, tmp_path / "out", message)


def test_two_stage_models_are_refused(copied: Path, tmp_path: Path) -> None:
    edit_json("model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])(copied)
    (copied / "transformer_2").mkdir()
    refused(copied, tmp_path / "out", r"transformer_2: expected none, .*two-stage Wan2.2")


def test_shards_must_be_those_of_the_index(tmp_path: Path) -> None:
    source = write_wan_folder(tmp_path / "wan", text=False, vae=False, max_shard_size=20_000)
    index_file = source / f"{WEIGHTS}.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, shard in index["weight_map"].items() if shard == shards[1])
    file = re.escape(f"transformer/{shards[1]}")

    def listed(**changes: str | None) -> None:
        places = {key: shard for key, shard in (index["weight_map"] | changes).items() if shard is not None}
        index_file.write_text(json.dumps({"weight_map": places}))

    listed(**{name: shards[0]})
    refused(source, tmp_path / "out", rf"{file}: tensor '{name}': .*index.json lists it in {shards[0]}")
    listed(**{name: None})
    refused(source, tmp_path / "out", rf"{file}: tensor '{name}' is not listed in .*index.json")
    listed(**{name: "../elsewhere.safetensors"})
    refused(source, tmp_path / "out", r"index.json: expected names of files beside it, got '../elsewhere.safetensors'")
    listed(another=shards[1])
    refused(source, tmp_path / "out", rf"{file}: tensor 'another' is missing; .*index.json lists it here")
    listed()
    (source / "transformer" / shards[1]).unlink()
    refused(source, tmp_path / "out", rf"{file}: missing, damaged or cut short")


def test_one_shard_alone_is_refused(tmp_path: Path) -> None:
    source = write_wan_folder(tmp_path / "wan", text=False, vae=False, max_shard_size=20_000)
    shard = sorted((source / "transformer").glob("*-of-*"))[0]
    refused(shard, tmp_path / "out", r"one shard of several; give the folder")


# --- the original release --------------------------------------------------------------------------------------------


ORIGINAL: dict[str, tuple[Change, str]] = {
    "image-to-video": (
        edit_json("config.json", model_type="i2v"),
        r"config.json: model_type: expected 't2v', got",
    ),
    "more channels": (edit_json("config.json", in_dim=36), r"config.json: in_dim: expected 16, got 36"),
    "another prompt length": (edit_json("config.json", text_len=226), r"config.json: text_len: expected 512, got 226"),
    "windows": (
        edit_json("config.json", window_size=[8, 8]),
        r"config.json: window_size: expected \(-1, -1\), got \[8",
    ),
    "unknown field": (edit_json("config.json", vace_layers=[0]), r"config.json: unknown field 'vace_layers'"),
    "no number": (edit_json("config.json", dim=None), r"config.json: dim: expected a positive whole number, got None"),
    "odd heads": (
        edit_json("config.json", num_heads=5),
        r"config.json: dim: expected a multiple of num_heads 5",
    ),
    "tensor of another model": (
        edit_tensors(
            "diffusion_pytorch_model.safetensors", lambda t: t.update({"img_emb.proj.0.weight": torch.ones(1)})
        ),
        r"tensor 'img_emb.proj.0.weight' is none of text-to-video Wan2.1's",
    ),
    "another shape": (
        edit_tensors(FILE, lambda t: t.update({"head.head.bias": torch.ones(2)})),
        r"tensor 'head.head.bias': expected \[64\], got \[2\]",
    ),
}


@pytest.mark.parametrize("damage", ORIGINAL)
def test_damaged_releases_are_named(release: Path, tmp_path: Path, damage: str) -> None:
    change, message = ORIGINAL[damage]
    change(release)
    assert str(release) in refused(release, tmp_path / "out", message)


def test_files_that_do_not_tell_their_sizes_are_refused(wan: Path, tmp_path: Path) -> None:
    tensors = original_tensors(load_file(wan / WEIGHTS))
    file = tmp_path / "wan2.1.safetensors"
    save_file(tensors, file)
    refused(file, tmp_path / "out", r"expected a width that is a multiple of 128, got 24")
    wide = torch.zeros(128, 36, 1, 2, 2)
    save_file(tensors | {"patch_embedding.weight": wide}, file)
    refused(file, tmp_path / "out", r"wan2.1.safetensors: in_channels: expected 16, got 36")
    save_file(tensors | {"patch_embedding.weight": torch.zeros(4, 128, 16, 1, 2, 2)}, file)
    refused(file, tmp_path / "out", r"tensor 'patch_embedding.weight': expected 5 dimensions, got \[4, 128, 16")
    save_file({"unet.weight": torch.zeros(1)}, file)
    refused(file, tmp_path / "out", r"tensor 'patch_embedding.weight' is missing")


def test_places_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "nothing", tmp_path / "out", r"nothing: no such file or folder; expected a hub id")
    refused(tmp_path / "empty", tmp_path / "out", r"empty: expected a hub id .* got a folder with none of")
    refused(tmp_path / "notes.txt", tmp_path / "out", r"notes.txt: expected a hub id")


# --- pickles ---------------------------------------------------------------------------------------------------------


def told_command(error: str) -> list[str]:
    """The command that an error ends with, run by this interpreter."""
    words = shlex.split(error[error.index("python -c") :])
    assert words[:2] == ["python", "-c"] and len(words) == 5
    return [sys.executable, *words[1:]]


def test_the_command_that_an_error_tells_converts_the_pickle(wan: Path, tmp_path: Path) -> None:
    """The original release has its VAE as a pickle; so may have anybody his transformer."""
    model = WanTransformer3DModel.from_pretrained(wan / "transformer")
    place = write_original_folder(tmp_path / "a release's folder", model)
    tensors = load_file(place / "diffusion_pytorch_model.safetensors")
    (place / "diffusion_pytorch_model.safetensors").unlink()
    whole = torch.cat([tensor.flatten() for tensor in tensors.values()])  # views of one storage, one not contiguous
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    views = {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
    name = "blocks.0.ffn.0.weight"
    views[name] = tensors[name].t().contiguous().t()
    torch.save(views, place / "diffusion_pytorch_model.pth")
    for source in (place, place / "diffusion_pytorch_model.pth"):
        error = refused(source, tmp_path / "out", r"diffusion_pytorch_model.pth: only safetensors are read")
    subprocess.run(told_command(error), check=True)
    init_from_wan(place, tmp_path / "out", torch.float32)
    made = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(made[name][2], tensor) for name, tensor in model.state_dict().items())


def test_the_pickled_vae_of_a_release_is_told_and_its_text_encoder_is_not_looked_at(
    release: Path, tmp_path: Path
) -> None:
    torch.save({}, release / "models_t5_umt5-xxl-enc-bf16.pth")
    init_from_wan(release, tmp_path / "out")
    torch.save({"x": torch.zeros(1)}, release / "Wan2.1_VAE.pth")
    error = refused(release, tmp_path / "new", r"Wan2.1_VAE.pth: only safetensors are read")
    assert told_command(error)[-1].endswith("Wan2.1_VAE.safetensors")
    save_file({"x": torch.zeros(1)}, release / "Wan2.1_VAE.safetensors")
    refused(release, tmp_path / "new", r"Wan2.1_VAE.safetensors: tensor 'encoder.conv1.weight' is missing")


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the pickle ran')",)


def test_the_command_runs_no_code(tmp_path: Path) -> None:
    torch.save({"x": Planted()}, tmp_path / "wan.pth")
    error = refused(tmp_path / "wan.pth", tmp_path / "out", "only safetensors are read")
    done = subprocess.run(told_command(error), capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "weights_only" in done.stderr.lower().replace(" ", "_")
    assert not (tmp_path / "wan.safetensors").exists()


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded_without_pickles_and_code(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def snapshot(repo: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked[repo] = (allow_patterns, local_files_only)
        return str(wan)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    done = init_from_wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", tmp_path / "out")
    assert done.source == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    origin = json.loads((tmp_path / "out" / CONFIG).read_text())["origin"]
    assert origin == "Wan2.1 transformer from Wan-AI/Wan2.1-T2V-1.3B-Diffusers (diffusers layout)"
    ((patterns, local),) = asked.values()
    assert not local
    suffixes = {pattern.rpartition(".")[2] for pattern in patterns}
    assert suffixes == {"json", "safetensors", "model", "txt"}


def test_a_hub_id_that_can_not_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"^checkpoint owner/name: no such folder here, nor loaded .*: We couldn't"):
        open_source("owner/name")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(UserError, match="never overwritten"):  # told before the download
        init_from_wan("owner/name", tmp_path / "full")
