"""The way back: a Wan checkpoint out of a u4d one, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

import u4d
from convert.wan_folders import write_wan_folder
from u4d.checkpoint_files import stored_tensors
from u4d.convert import extract_stream, init_from_wan
from u4d.diffusion.flow import STREAMS
from u4d.errors import UserError
from u4d.model.transformer import Transformer

CONFIG = "transformer/config.json"
FILE = "transformer/diffusion_pytorch_model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A u4d transformer whose streams differ; do not change it."""
    folder = tmp_path_factory.mktemp("four") / "u4d"
    config = u4d.presets.debug().transformer
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Transformer(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("stream", ("rgb", "ray_moment"))
def test_what_went_in_comes_out(tmp_path: Path, dtype: torch.dtype, stream: str) -> None:
    """Every file of the source, byte for byte: weights, configurations, tokenizer and index."""
    source = write_wan_folder(tmp_path / "wan", dtype=dtype)
    init_from_wan(source, tmp_path / "u4d", dtype, shard_bytes=30_000)
    done = extract_stream(tmp_path / "u4d", tmp_path / "back", stream)
    assert contents(tmp_path / "back") == contents(source)
    assert dict(done.left_out).keys() == {"null_text"}
    assert (done.num_files, done.num_bytes) == (
        len(contents(source)),
        sum(map(len, contents(source).values())),
    )


def test_diffusers_loads_it(wan: Path, tmp_path: Path) -> None:
    init_from_wan(wan, tmp_path / "u4d", torch.float32)
    extract_stream(tmp_path / "u4d", tmp_path / "back", shard_bytes=30_000)
    model, info = WanTransformer3DModel.from_pretrained(tmp_path / "back/transformer", output_loading_info=True)
    assert not any(info.values()), info
    original = WanTransformer3DModel.from_pretrained(wan / "transformer")
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    ignored = ("_name_or_path",)
    assert {k: v for k, v in model.config.items() if k not in ignored} == {
        k: v for k, v in original.config.items() if k not in ignored
    }
    assert len(list((tmp_path / "back/transformer").glob("*.safetensors"))) > 1
    assert type(WanPipeline.from_pretrained(tmp_path / "back").transformer) is WanTransformer3DModel


@pytest.mark.parametrize("stream", STREAMS)
def test_every_stream_is_its_own(four: Path, tmp_path: Path, stream: str) -> None:
    done = extract_stream(four, tmp_path / "back", stream)
    model, info = WanTransformer3DModel.from_pretrained(tmp_path / "back/transformer", output_loading_info=True)
    assert not any(info.values()), info
    stacked = load_file(four / FILE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stacked[name][STREAMS.index(stream)]), name
    # The debug preset has motion features and a link, as tiny has: told, and not taken.
    assert dict(done.left_out).keys() == {"null_text", "motion", "link"}


def test_dtypes_are_kept_tensor_by_tensor(wan: Path, tmp_path: Path) -> None:
    init_from_wan(wan, tmp_path / "u4d")
    extract_stream(tmp_path / "u4d", tmp_path / "back")
    source = stored_tensors(tmp_path / "u4d/transformer")
    back = stored_tensors(tmp_path / "back/transformer")
    assert {tensor.dtype for tensor in back.values()} == {"BF16", "F32"}
    assert all(tensor.dtype == source[name].dtype for name, tensor in back.items())


def test_the_shipped_checkpoint_gives_a_transformer(tmp_path: Path) -> None:
    done = extract_stream("tiny", tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["transformer"]
    assert "vae" in dict(done.left_out)
    assert json.loads((tmp_path / "back" / CONFIG).read_text())["_class_name"] == "WanTransformer3DModel"


def test_without_a_text_encoder_the_index_says_so(tmp_path: Path) -> None:
    source = write_wan_folder(tmp_path / "wan", text=False)
    init_from_wan(source, tmp_path / "u4d", torch.float32)
    done = extract_stream(tmp_path / "u4d", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    assert "text_encoder, tokenizer" in dict(done.left_out)
    pipe = WanPipeline.from_pretrained(tmp_path / "back", text_encoder=None, tokenizer=None)
    assert pipe.vae.config.z_dim == 16


def test_refusals(wan: Path, four: Path, tmp_path: Path) -> None:
    shutil.copytree(four, tmp_path / "cut")
    (tmp_path / "cut" / FILE).write_bytes((four / FILE).read_bytes()[:-10])
    before = contents(tmp_path)
    for source, stream, message in (
        (four, "audio", "stream: expected one of rgb, depth, ray_dir, ray_moment, got 'audio'"),
        (wan, "rgb", "expected a u4d Pipeline, got 'WanPipeline'"),
        (wan / "transformer", "rgb", "_class_name: expected Transformer"),
        (tmp_path / "cut", "rgb", rf"{FILE}: missing, damaged or cut short"),
        (tmp_path / "cut/transformer", "rgb", rf"{FILE}: missing, damaged or cut short"),
        (tmp_path / "nothing", "rgb", "expected a shipped preset"),
    ):
        with pytest.raises(UserError, match=message):
            extract_stream(source, tmp_path / "back", stream)
    assert contents(tmp_path) == before


def test_the_source_is_never_replaced(four: Path, tmp_path: Path) -> None:
    shutil.copytree(four, tmp_path / "u4d")
    for source in (tmp_path / "u4d", tmp_path / "u4d/transformer"):
        with pytest.raises(UserError, match="would replace it"):
            extract_stream(source, tmp_path / "u4d", overwrite=True)
    assert contents(tmp_path / "u4d") == contents(four)
