"""Four streams from Wan2.1: every tensor in every stream, whatever the source's form, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import u4d
from convert.original_files import original_tensors, original_vae_tensors, write_original_folder
from convert.wan_folders import small_vae, write_wan_folder
from u4d.checkpoint_files import stored_tensors
from u4d.convert import init_from_wan
from u4d.convert.original_names import PREFIX
from u4d.convert.starting_values import FRESH_SEED
from u4d.diffusion.flow import STREAMS
from u4d.errors import UserError
from u4d.model.transformer import Transformer
from u4d.text_encoder import encode_prompt

EXACT = ("time_embedder", "scale_shift_table", "norm2")
ENDS = ("patch_embedding", "proj_out")
FILE = "transformer/diffusion_pytorch_model.safetensors"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Everything in a model's weight files, as it is stored."""
    return {name: stored.read() for name, stored in stored_tensors(folder).items()}


def assert_stacked(made: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Every tensor of the source, bit for bit, once per stream; nothing else but the null text."""
    assert made.keys() == source.keys() | {"null_text"}
    for name, tensor in source.items():
        assert made[name].dtype == tensor.dtype and torch.equal(made[name], torch.stack([tensor] * 4)), name


def loaded(out: Path) -> Transformer:
    """The new transformer through its own loader; missing and unexpected tensors are an error."""
    model, info = Transformer.from_pretrained(out / "transformer", output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("size", (10**10, 20_000))
def test_float32_stays_float32(tmp_path: Path, size: int) -> None:
    source = write_wan_folder(tmp_path / "wan", max_shard_size=size)
    done = init_from_wan(source, tmp_path / "out", torch.float32, shard_bytes=4 * size)
    original = tensors_of(source / "transformer")
    assert_stacked(tensors_of(tmp_path / "out/transformer"), original)
    model = loaded(tmp_path / "out")
    for name, tensor in original.items():
        assert torch.equal(model.state_dict()[name], torch.stack([tensor] * 4)), name
    assert (len(list((tmp_path / "out/transformer").glob("*.safetensors"))) > 1) == (size < 10**10)
    files = [file for file in done.out.rglob("*") if file.is_file()]
    assert (done.num_files, done.num_bytes) == (len(files), sum(file.stat().st_size for file in files))


def test_bfloat16_is_rounded_but_for_what_must_be_exact(wan: Path, tmp_path: Path) -> None:
    init_from_wan(wan, tmp_path / "out")
    made = tensors_of(tmp_path / "out/transformer")
    for name, tensor in tensors_of(wan / "transformer").items():
        exact = any(part in EXACT for part in name.split("."))
        expected = tensor if exact else tensor.bfloat16()
        assert made[name].dtype == expected.dtype and torch.equal(made[name][3], expected), name
    assert made["null_text"].dtype == torch.bfloat16


def test_a_bfloat16_source_is_never_widened(tmp_path: Path) -> None:
    source = write_wan_folder(tmp_path / "wan", dtype=torch.bfloat16)
    init_from_wan(source, tmp_path / "out")
    original = tensors_of(source / "transformer")
    assert {tensor.dtype for tensor in original.values()} == {torch.bfloat16}
    assert_stacked(tensors_of(tmp_path / "out/transformer"), original)
    init_from_wan(source, tmp_path / "wide", torch.float32)
    wide = tensors_of(tmp_path / "wide/transformer")
    assert_stacked(wide, {name: tensor.float() for name, tensor in original.items()})


def test_a_source_in_two_precisions_keeps_both(wan: Path, tmp_path: Path) -> None:
    """As diffusers saves what it loaded in bfloat16."""
    mixed = WanTransformer3DModel.from_pretrained(wan / "transformer", dtype=torch.bfloat16)
    mixed.save_pretrained(tmp_path / "mixed/transformer")
    original = tensors_of(tmp_path / "mixed/transformer")
    assert {tensor.dtype for tensor in original.values()} == {torch.bfloat16, torch.float32}
    init_from_wan(tmp_path / "mixed", tmp_path / "out")
    assert_stacked(tensors_of(tmp_path / "out/transformer"), original)


@pytest.mark.parametrize("shard_bytes", (10**10, 70_000, 1))
def test_files_are_byte_for_byte_what_diffusers_writes(wan: Path, tmp_path: Path, shard_bytes: int) -> None:
    init_from_wan(wan, tmp_path / "out", torch.float32, shard_bytes=shard_bytes)
    loaded(tmp_path / "out").save_pretrained(tmp_path / "saved", max_shard_size=shard_bytes)
    ours = {file.name: file.read_bytes() for file in (tmp_path / "out/transformer").iterdir()}
    theirs = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    config, saved = json.loads(ours.pop("config.json")), json.loads(theirs.pop("config.json"))
    saved.pop("_name_or_path")
    assert config == saved
    assert ours == theirs
    assert (len(ours) == 1) == (shard_bytes == 10**10)


def test_all_else_of_the_folder_comes_along(wan: Path, tmp_path: Path) -> None:
    init_from_wan(wan, tmp_path / "out", torch.float32)
    for part in ("vae", "text_encoder", "tokenizer"):
        files = {file.name: file.read_bytes() for file in (wan / part).iterdir()}
        assert {file.name: file.read_bytes() for file in (tmp_path / "out" / part).iterdir()} == files
    pipe = u4d.Pipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.vae, AutoencoderKLWan) and isinstance(pipe.transformer, Transformer)
    assert pipe.scheduler.config.flow_shift == 3.0
    shipped = json.loads((u4d.checkpoint.SHIPPED / "tiny/model_index.json").read_text())
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index.keys() == shipped.keys()
    assert index["transformer"] == shipped["transformer"] and index["scheduler"] == shipped["scheduler"]
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert index["text_encoder"] == ["transformers", "UMT5EncoderModel"]
    assert index["tokenizer"] == json.loads((wan / "model_index.json").read_text())["tokenizer"]
    assert (index["dense_steps"], index["dense_guidance"]) == (40, 2.0)


def test_the_configuration_tells_sizes_clip_statistics_and_origin(wan: Path, tmp_path: Path) -> None:
    init_from_wan(wan, tmp_path / "out", num_frames=6, image_size=(32, 48))
    config = loaded(tmp_path / "out").config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (2, 2, 12)
    assert (config.ffn_dim, config.text_dim, config.freq_dim, config.text_length) == (40, 16, 16, 512)
    assert (config.num_frames, tuple(config.image_size)) == (6, (32, 48))
    assert config.origin == f"Wan2.1 transformer from {wan} (diffusers layout)"
    vae = small_vae().config
    for row in (0, 1):
        assert list(config.latents_mean[row]) == vae.latents_mean and list(config.latents_std[row]) == vae.latents_std
    init_from_wan(wan, tmp_path / "preset")
    preset = loaded(tmp_path / "preset").config
    assert (preset.num_frames, tuple(preset.image_size)) == (50, (240, 320))


def test_statistics_are_those_of_the_sources_own_vae(wan: Path, tmp_path: Path) -> None:
    source = write_wan_folder(tmp_path / "wan", text=False)
    config = json.loads((source / "vae/config.json").read_text())
    config["latents_mean"][3], config["latents_std"][5] = 0.25, 7.5
    (source / "vae/config.json").write_text(json.dumps(config))
    init_from_wan(source, tmp_path / "out")
    made = loaded(tmp_path / "out").config
    assert made.latents_mean[0][3] == made.latents_mean[1][3] == 0.25
    assert made.latents_std[0][5] == made.latents_std[1][5] == 7.5


def test_the_empty_prompt_is_stored(wan: Path, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        out = init_from_wan(wan, tmp_path / str(dtype), dtype).out
        stored = tensors_of(out / "transformer")["null_text"]
        assert torch.equal(stored, encode_prompt(wan, "", dtype)) and stored.abs().max() > 0.1


def test_without_text_the_null_text_is_zero_and_listed(tmp_path: Path) -> None:
    source = write_wan_folder(tmp_path / "wan", text=False)
    done = init_from_wan(source, tmp_path / "out", torch.float32)
    assert not tensors_of(tmp_path / "out/transformer")["null_text"].any()
    assert {"null text", "text_encoder, tokenizer"} <= {name for name, _ in done.left_out}
    assert not (tmp_path / "out/text_encoder").exists()
    assert u4d.Pipeline.from_pretrained(tmp_path / "out").text_encoder is None


@pytest.mark.parametrize("place", ("wan", "wan/transformer"))
def test_a_transformer_alone_gives_a_transformer_alone(tmp_path: Path, place: str) -> None:
    write_wan_folder(tmp_path / "wan", text=False, vae=False)
    done = init_from_wan(tmp_path / place, tmp_path / "out", torch.float32)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["transformer"]
    assert_stacked(tensors_of(tmp_path / "out/transformer"), load_file(tmp_path / "wan" / FILE))
    assert {"vae", "null text", "text_encoder, tokenizer"} == {name for name, _ in done.left_out}
    assert list(loaded(tmp_path / "out").config.latents_std[0]) == small_vae().config.latents_std


def test_a_stream_that_is_not_named_starts_afresh(wan: Path, tmp_path: Path) -> None:
    init_from_wan(wan, tmp_path / "out", torch.float32, streams=("rgb", "ray_dir"))
    made, source = loaded(tmp_path / "out"), tensors_of(wan / "transformer")
    with torch.random.fork_rng():
        torch.manual_seed(FRESH_SEED)
        new = Transformer(u4d.presets.TransformerConfig(**small_sizes(made))).state_dict()
    for name, tensor in source.items():
        for index, stream in enumerate(STREAMS):
            fresh = name.split(".")[0] in ENDS and stream in ("depth", "ray_moment")
            expected = new[name][index] if fresh else tensor
            assert torch.allclose(made.state_dict()[name][index], expected, atol=1e-6), (name, stream)
            assert fresh or torch.equal(made.state_dict()[name][index], expected), (name, stream)
    assert "depth, ray_moment untrained" in made.config.origin
    init_from_wan(wan, tmp_path / "again", torch.float32, streams=("rgb", "ray_dir"))
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


def small_sizes(model: Transformer) -> dict[str, Any]:
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim", "freq_dim")
    return {name: model.config[name] for name in names}


# --- the original release --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (10**10, 20_000))
def test_an_original_folder(wan: Path, tmp_path: Path, size: int) -> None:
    model = WanTransformer3DModel.from_pretrained(wan / "transformer")
    source = write_original_folder(tmp_path / "release", model, size)
    done = init_from_wan(source, tmp_path / "out", torch.float32)
    assert_stacked(tensors_of(tmp_path / "out/transformer"), model.state_dict())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["transformer"]
    assert "original release" in loaded(tmp_path / "out").config.origin
    assert any(name == "text_encoder, tokenizer" and "original release" in why for name, why in done.left_out)


@pytest.mark.parametrize("prefix", ("", PREFIX))
def test_one_original_file(tmp_path: Path, prefix: str) -> None:
    source = write_wan_folder(tmp_path / "wan", text=False, vae=False, attention_head_dim=128, ffn_dim=48)
    tensors = load_file(source / FILE)
    save_file(original_tensors(tensors, prefix), tmp_path / "wan2.1.safetensors")
    init_from_wan(tmp_path / "wan2.1.safetensors", tmp_path / "out", torch.float32)
    assert_stacked(tensors_of(tmp_path / "out/transformer"), tensors)
    config = loaded(tmp_path / "out").config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (2, 2, 128)
    assert (config.ffn_dim, config.text_dim, config.freq_dim) == (48, 16, 16)


def test_the_original_vae_once_it_is_safetensors(wan: Path, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(wan / "transformer")
    source = write_original_folder(tmp_path / "release", model)
    with torch.random.fork_rng():
        vae = AutoencoderKLWan(base_dim=8)
    save_file(original_vae_tensors(vae), source / "Wan2.1_VAE.safetensors")
    init_from_wan(source, tmp_path / "out")
    made = u4d.Pipeline.from_pretrained(tmp_path / "out").vae
    assert made.config.base_dim == 8 and made.config.latents_mean == vae.config.latents_mean
    for name, tensor in vae.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name


# --- whole or not at all ---------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(error: BaseException, after: int) -> Callable[..., None]:
    calls: Iterator[int] = iter(range(10**9))

    def progress(part: str, done: int, total: int) -> None:
        if next(calls) == after:
            raise error

    return progress


@pytest.mark.parametrize("after", (0, 40, 278))
def test_an_interrupt_leaves_nothing_or_the_older_checkpoint(wan: Path, tmp_path: Path, after: int) -> None:
    stop = failing(KeyboardInterrupt(), after)
    with pytest.raises(KeyboardInterrupt):
        init_from_wan(wan, tmp_path / "new/out", progress=stop, shard_bytes=30_000)
    assert list(tmp_path.iterdir()) == []
    init_from_wan(wan, tmp_path / "out", num_frames=6)
    before = contents(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        init_from_wan(wan, tmp_path / "out", overwrite=True, progress=failing(OSError("disk full"), after))
    assert contents(tmp_path) == before


def test_an_older_checkpoint_is_replaced_only_when_asked(wan: Path, tmp_path: Path) -> None:
    init_from_wan(wan, tmp_path / "out", num_frames=6)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds an older result"):
        init_from_wan(wan, tmp_path / "out")
    assert contents(tmp_path) == before
    init_from_wan(wan, tmp_path / "out", num_frames=10, overwrite=True)
    assert loaded(tmp_path / "out").config.num_frames == 10
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="never overwritten"):
        init_from_wan(wan, tmp_path / "mine", overwrite=True)


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    source = write_wan_folder(tmp_path / "wan", text=False)
    before = contents(tmp_path)
    for given in (source, source / "transformer"):
        with pytest.raises(UserError, match="would replace it"):
            init_from_wan(given, source, overwrite=True)
    assert contents(tmp_path) == before


def test_too_little_space_is_told_before_anything_is_written(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("u4d.convert.folders.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"out: expected 0.0 GB of free space"):
        init_from_wan(wan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_options_without_sense_are_refused(wan: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"dtype": torch.float16}, "dtype: expected bfloat16 or float32, got torch.float16"),
        ({"streams": ("depth",)}, "streams: expected names among"),
        ({"streams": ("rgb", "audio")}, "streams: expected names among"),
        ({"streams": "rgb"}, "streams: expected names among"),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1"),
        ({"image_size": (100, 30)}, "image_size: expected"),
        ({"num_frames": 0}, "num_frames: expected"),
    ):
        with pytest.raises(UserError, match=message):
            init_from_wan(wan, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_headers_say_that_they_are_torch_tensors(wan: Path, tmp_path: Path) -> None:
    init_from_wan(wan, tmp_path / "out")
    with safe_open(tmp_path / "out" / FILE, framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
