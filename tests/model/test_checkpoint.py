"""Checkpoints: what is saved comes back bit for bit, and whatever is damaged ends in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from model_samples import random_inputs, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

import u4d
from convert.wan_folders import write_wan_folder
from u4d import presets
from u4d.checkpoint import check_folder, check_weights, find_checkpoint, save_checkpoint
from u4d.checkpoint_files import WEIGHTS
from u4d.errors import UserError
from u4d.model.codec import TinyCodec
from u4d.model.transformer import Transformer

Change = Callable[[Path], None]


def random_parts() -> tuple[Transformer, TinyCodec]:
    """Transformer and codec of the `debug` preset, every value of them random."""
    preset = presets.debug()
    rows = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    mean, std = (tuple(map(tuple, table.tolist())) for table in rows)
    transformer = Transformer(replace(preset.transformer, latents_mean=mean, latents_std=std))
    randomise(transformer, seed=1)
    for name, buffer in transformer.named_buffers():
        buffer.normal_(generator=torch.Generator().manual_seed(len(name)))
    return transformer, randomise(TinyCodec(**asdict(preset.codec)), seed=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in float32; do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    save_checkpoint(folder, *random_parts(), torch.float32)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_comes_back_bit_for_bit(saved: Path) -> None:
    pipe = u4d.Pipeline.from_pretrained(saved)
    for loaded, original in zip((pipe.transformer, pipe.vae), random_parts(), strict=True):
        assert type(loaded) is type(original)
        assert loaded.state_dict().keys() == original.state_dict().keys()
        for name, tensor in original.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert not loaded.training
    config = random_parts()[0].config
    assert torch.equal(pipe.statistics.mean, torch.tensor(config.latents_mean))
    assert torch.equal(pipe.statistics.std, torch.tensor(config.latents_std))
    assert pipe.scheduler.config.flow_shift == 3.0
    latents, times, text = random_inputs(frames=3)
    with torch.no_grad():
        assert torch.equal(pipe.transformer(latents, times, text), random_parts()[0](latents, times, text))


def test_half_precision_is_rounded_and_keeps_what_must_be_exact(tmp_path: Path) -> None:
    transformer, codec = random_parts()
    save_checkpoint(tmp_path / "half", transformer, codec, torch.bfloat16)
    assert transformer.dtype == codec.dtype == torch.float32  # the caller's own are left as they were
    wide = u4d.Pipeline.from_pretrained(tmp_path / "half")
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(wide.transformer.state_dict()[name], tensor.bfloat16().float()), name
    half = u4d.Pipeline.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    exact = ("time_embedder", "scale_shift_table", "norm2", "motion")
    for name, tensor in half.transformer.state_dict().items():
        expected = torch.float32 if any(part in name.split(".") for part in exact) else torch.bfloat16
        assert tensor.dtype == expected, name
    latents, times, _ = random_inputs(frames=3)
    with torch.no_grad():
        velocity = half.transformer(latents.bfloat16(), times)
        truth = wide.transformer(latents, times)
    assert ((velocity - truth).square().mean() / truth.square().mean()).sqrt() < 0.05


def test_saving_replaces_an_older_checkpoint_or_leaves_it(
    saved: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, codec = random_parts()
    changed = randomise(transformer, seed=5)
    with monkeypatch.context() as patch:

        def half_way(self: DiffusionPipeline, folder: Path) -> None:
            Path(folder).mkdir()
            raise OSError("disk full")

        patch.setattr(DiffusionPipeline, "save_pretrained", half_way)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(copied, changed, codec, torch.float32)
    assert contents(copied) == contents(saved)
    save_checkpoint(copied, changed, codec, torch.float32)
    loaded = u4d.Pipeline.from_pretrained(copied).transformer
    assert torch.equal(loaded.proj_out.weight, changed.proj_out.weight)
    assert [path.name for path in copied.parent.iterdir()] == ["checkpoint"]


def edit_json(path: str, **changes: object) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(content | changes))

    return change


def edit_tensors(path: str, edit: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / path)
        edit(tensors)
        save_file(tensors, folder / path)

    return change


def cut(path: str, size: int) -> Change:
    def change(folder: Path) -> None:
        (folder / path).write_bytes((folder / path).read_bytes()[:size])

    return change


def remove(path: str) -> Change:
    return lambda folder: (folder / path).unlink()


def add_pickle(folder: Path) -> None:
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")


TRANSFORMER, VAE = f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}"
QUERY = "blocks.1.attn1.to_q.weight"
DAMAGES: dict[str, tuple[Change, str]] = {
    "weights cut short": (cut(TRANSFORMER, 50_000), rf"{TRANSFORMER}: missing, damaged or cut short"),
    "weights cut in the header": (cut(VAE, 100), rf"{VAE}: missing, damaged or cut short"),
    "weights empty": (cut(VAE, 0), rf"{VAE}: missing, damaged or cut short"),
    "weights missing": (remove(TRANSFORMER), rf"{TRANSFORMER}: missing, damaged or cut short"),
    "tensor missing": (
        edit_tensors(TRANSFORMER, lambda t: t.pop(QUERY)),
        rf"{TRANSFORMER}: tensor '{QUERY}' is missing",
    ),
    "buffer missing": (
        edit_tensors(TRANSFORMER, lambda t: t.pop("motion.grey_group")),
        rf"{TRANSFORMER}: tensor 'motion.grey_group' is missing",
    ),
    "codec's tensor missing": (
        edit_tensors(VAE, lambda t: t.pop("coders.rgb_4.analysis.bias")),
        rf"{VAE}: tensor 'coders.rgb_4.analysis.bias' is missing",
    ),
    "tensor of another shape": (
        edit_tensors(TRANSFORMER, lambda t: t.update({QUERY: t[QUERY][:, :3].clone()})),
        rf"{TRANSFORMER}: tensor '{QUERY}': expected \[4, 24, 24\], got \[4, 3, 24\]$",
    ),
    "another number of streams": (
        edit_tensors(TRANSFORMER, lambda t: t.update({QUERY: t[QUERY][:3].clone()})),
        rf"{TRANSFORMER}: tensor '{QUERY}': expected 4 streams, got 3",
    ),
    "no streams": (
        edit_tensors(TRANSFORMER, lambda t: t.update({QUERY: t[QUERY][0].clone()})),
        rf"{TRANSFORMER}: tensor '{QUERY}': expected \[4, 24, 24\], got \[24, 24\]; this is Wan's own, .*u4d init",
    ),
    "another number of linked streams": (
        edit_tensors(TRANSFORMER, lambda t: t.update({"link.linear.bias": t["link.linear.bias"][:2].clone()})),
        rf"{TRANSFORMER}: tensor 'link.linear.bias': expected \[3, 24\], got \[2, 24\]$",
    ),
    "tensor too many": (
        edit_tensors(TRANSFORMER, lambda t: t.update(surprise=torch.zeros(1))),
        rf"{TRANSFORMER}: tensor 'surprise' is not known to Transformer",
    ),
    "pickle": (
        add_pickle,
        r"transformer/diffusion_pytorch_model.bin: only safetensors are read.*python -c .*weights_only=True",
    ),
    "unknown field": (edit_json("transformer/config.json", num_experts=8), r"transformer/config.json: .*'num_experts'"),
    "unknown field of the codec": (edit_json("vae/config.json", stride=4), r"vae/config.json: .*'stride'"),
    "another size": (edit_json("transformer/config.json", num_layers=3), rf"{TRANSFORMER}: tensor 'blocks.2.*missing"),
    "a field without sense": (
        edit_json("transformer/config.json", num_layers=-1),
        r"transformer/config.json: num_layers",
    ),
    "configuration missing": (remove("vae/config.json"), r"vae/config.json: can't be read as JSON"),
    "configuration cut short": (cut("transformer/config.json", 40), r"transformer/config.json: can't be read as JSON"),
    "scheduler missing": (remove("scheduler/scheduler_config.json"), r"can't be loaded: .*scheduler"),
    "index missing": (remove("model_index.json"), r"expected a diffusers folder with model_index.json"),
    "index cut short": (cut("model_index.json", 30), r"model_index.json: can't be read as JSON"),
    "index of another kind": (
        lambda folder: (folder / "model_index.json").write_text("[]") and None,
        r"model_index.json: expected a JSON object, got list",
    ),
    "another pipeline": (
        edit_json("model_index.json", _class_name="WanPipeline"),
        r"model_index.json: expected a u4d Pipeline, got 'WanPipeline'; u4d init --from .* makes one of it",
    ),
    "component missing": (edit_json("model_index.json", vae=[None, None]), r"expected a component 'vae', found none"),
    "code from elsewhere": (
        edit_json("model_index.json", vae=["subprocess", "Popen"]),
        r"component 'vae': expected a class of u4d.*subprocess",
    ),
    "class that does not exist": (
        edit_json("model_index.json", vae=["u4d.model.codec", "HugeCodec"]),
        r"component 'vae': expected a class of u4d.*HugeCodec",
    ),
    "module that does not exist": (
        edit_json("model_index.json", vae=["u4d.model.nothing", "TinyCodec"]),
        r"component 'vae': expected a class of u4d.*nothing",
    ),
    "no class but a function": (
        edit_json("model_index.json", vae=["u4d.model.codec", "coder_name"]),
        r"component 'vae': expected a class of u4d.*coder_name",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(copied: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(copied)
    with pytest.raises(UserError, match=message) as caught:
        u4d.Pipeline.from_pretrained(copied)
    assert len(str(caught.value).splitlines()) == 1
    assert str(copied) in str(caught.value)


def shard(folder: Path) -> list[Path]:
    """Store the transformer in several files, as large ones are."""
    transformer = Transformer.from_pretrained(folder / "transformer")
    (folder / TRANSFORMER).unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="60KB")
    return sorted((folder / "transformer").glob("*-of-*.safetensors"))


def test_shards_are_put_together(copied: Path) -> None:
    assert len(shard(copied)) > 1
    loaded = u4d.Pipeline.from_pretrained(copied).transformer.state_dict()
    for name, tensor in random_parts()[0].state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_damaged_shards_are_named(copied: Path) -> None:
    shards = shard(copied)
    names = list(load_file(shards[1]))
    edit_tensors(str(shards[1].relative_to(copied)), lambda tensors: tensors.pop(names[0]))(copied)
    with pytest.raises(UserError, match=rf"tensor '{names[0]}' is missing"):
        u4d.Pipeline.from_pretrained(copied)
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name}: missing, damaged or cut short"):
        u4d.Pipeline.from_pretrained(copied)
    (copied / f"{TRANSFORMER}.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json: expected a weight_map"):
        u4d.Pipeline.from_pretrained(copied)


def test_shards_must_be_those_of_the_index(copied: Path) -> None:
    shards = [file.name for file in shard(copied)]
    index_file = copied / f"{TRANSFORMER}.index.json"
    listed = json.loads(index_file.read_text())["weight_map"]
    name = next(name for name, file in listed.items() if file == shards[1])
    for changes, message in (
        ({name: shards[0]}, rf"{shards[1]}: tensor '{name}': .*index.json lists it in {shards[0]}"),
        ({"another": shards[1]}, rf"{shards[1]}: tensor 'another' is missing; .*index.json lists it here"),
        ({name: "../vae/x.safetensors"}, r"index.json: expected names of files beside it, got '../vae/x.safetensors'"),
        ({name: 3}, r"index.json: expected names of files beside it, got 3"),
        ({"another": "nowhere.safetensors"}, r"nowhere.safetensors: missing, damaged or cut short"),
    ):
        index_file.write_text(json.dumps({"weight_map": listed | changes}))
        with pytest.raises(UserError, match=message):
            u4d.Pipeline.from_pretrained(copied)
    index_file.write_text(json.dumps({"weight_map": {key: file for key, file in listed.items() if key != name}}))
    with pytest.raises(UserError, match=rf"{shards[1]}: tensor '{name}' is not listed in .*index.json"):
        u4d.Pipeline.from_pretrained(copied)


@pytest.mark.parametrize("sharded", (False, True))
def test_a_text_encoder_must_be_whole_although_it_is_not_loaded(tmp_path: Path, sharded: bool) -> None:
    source = write_wan_folder(tmp_path / "wan", max_shard_size=20_000 if sharded else "1GB")
    folder = u4d.init_from_wan(source, tmp_path / "u4d").out
    check_folder(folder)
    weights = sorted((folder / "text_encoder").glob("*.safetensors"))
    assert (len(weights) > 1) == sharded
    whole = weights[-1].read_bytes()
    weights[-1].write_bytes(whole[:-8])
    with pytest.raises(UserError, match=rf"text_encoder/{weights[-1].name}: missing, damaged or cut short"):
        u4d.Pipeline.from_pretrained(folder)
    weights[-1].unlink()
    with pytest.raises(UserError, match=rf"text_encoder/{weights[-1].name}: missing, damaged or cut short"):
        check_folder(folder)
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"text_encoder/pytorch_model.bin: only safetensors .*text_encoder/model.safetensors$"
    ):
        check_folder(folder)


def test_models_of_diffusers_are_held_to_their_tensors_too(tmp_path: Path) -> None:
    AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    ).save_pretrained(tmp_path)
    check_weights(tmp_path, AutoencoderKLWan)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "_diffusers_version" in config
    (tmp_path / "config.json").write_text(json.dumps(config | {"stride": 4}))  # diffusers would only warn
    with pytest.raises(UserError, match=r"config.json: unknown field 'stride'; known are .*base_dim"):
        check_weights(tmp_path, AutoencoderKLWan)
    (tmp_path / "config.json").write_text(json.dumps(config))
    edit_tensors(WEIGHTS, lambda tensors: tensors.pop("decoder.conv_in.weight"))(tmp_path)
    with pytest.raises(UserError, match=r"tensor 'decoder.conv_in.weight' is missing"):
        check_weights(tmp_path, AutoencoderKLWan)


@pytest.mark.parametrize("name", ("huge", "no/such/folder", "./runs/checkpoint", "/nowhere/at-all", "a b/c", "../up"))
def test_unknown_presets_and_folders_are_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=r"expected a shipped preset \(.*\), a folder with model_index.json, or a hub id"
    ):
        u4d.Pipeline.from_pretrained(name)


def test_a_file_is_no_checkpoint(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="expected a shipped preset"):
        find_checkpoint(saved / "model_index.json")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a shipped preset"):
        find_checkpoint("weights/model.safetensors")


def test_untrained_weights_say_so(tmp_path: Path) -> None:
    _, codec = random_parts()
    save_checkpoint(tmp_path / "raw", Transformer(presets.debug().transformer), codec, torch.float32)
    with pytest.raises(UserError, match="not trained"):
        _ = u4d.Pipeline.from_pretrained(tmp_path / "raw").statistics
