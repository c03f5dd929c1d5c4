"""`u4d init`: a Wan folder in, a four-stream checkpoint out, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from in_process import Command, tree
from safetensors.torch import load_file

import u4d as package
from convert.wan_folders import write_wan_folder

FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Wan pipeline in float32; do not change it."""
    return write_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


def lines_of(out: str) -> dict[str, str]:
    """The facts that a command printed."""
    return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in out.splitlines())}


def test_a_wan_folder_becomes_a_checkpoint_and_comes_back(u4d: Command, wan: Path, tmp_path: Path) -> None:
    done = u4d("init", "--from", wan, "-o", tmp_path / "out", "--dtype", "fp32")
    assert done.code == 0
    facts = lines_of(done.out)
    assert facts["from"] == str(wan)
    assert facts["transformer"] == "2 layers of width 24, 4 streams; 70 tensors float32"
    assert facts["vae"] == facts["text_encoder, tokenizer"] == "copied"
    assert "empty prompt" in facts["null text"] and "UniPC" in facts["not taken: scheduler"]
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert facts["written"].startswith(f"{tmp_path / 'out'}: {len(files)} files, ")
    assert facts["next"] == f"u4d info {tmp_path / 'out'}"
    assert isinstance(package.Pipeline.from_pretrained(tmp_path / "out"), package.Pipeline)
    back = u4d("init", "--from", tmp_path / "out", "--extract", "rgb", "-o", tmp_path / "back")
    assert back.code == 0 and "the rgb stream" in back.out and "null_text" in back.out
    assert tree(tmp_path / "back") == tree(wan)


def test_the_default_is_bfloat16(u4d: Command, wan: Path, tmp_path: Path) -> None:
    done = u4d("init", "--from", wan, "-o", tmp_path / "out")
    assert "tensors bfloat16, 11 tensors float32" in done.out
    tensors = load_file(tmp_path / "out" / FILE)
    assert tensors["proj_out.weight"].dtype == torch.bfloat16
    assert tensors["scale_shift_table"].dtype == torch.float32


@pytest.mark.parametrize("streams", (("rgb", "ray_dir"), ("rgb,ray_dir",)))
def test_streams_frames_and_size(u4d: Command, wan: Path, tmp_path: Path, streams: tuple[str, ...]) -> None:
    options = ("--streams", *streams, "--frames", 6, "--size", "32x48")
    done = u4d("init", "--from", wan / "transformer", "-o", tmp_path / "out", *options)
    assert done.code == 0
    facts = lines_of(done.out)
    assert facts["patch embedding, head"] == "Wan's in rgb ray_dir; others afresh"
    assert "SOURCE has none" in facts["not taken: vae"] and "a pipeline needs a vae/ too" in facts["next"]
    head, source = load_file(tmp_path / "out" / FILE)["proj_out.weight"], load_file(wan / FILE)["proj_out.weight"]
    assert [torch.equal(row, source.bfloat16()) for row in head] == [True, False, True, False]
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert (config["num_frames"], config["image_size"]) == (6, [32, 48])


def test_an_older_checkpoint_is_kept_unless_told(u4d: Command, wan: Path, tmp_path: Path) -> None:
    command = ("init", "--from", wan, "-o", tmp_path / "out")
    assert u4d(*command).code == 0
    before = tree(tmp_path)
    refused = u4d(*command)
    assert refused.code == 2 and "--overwrite" in refused.err and len(refused.err.splitlines()) == 1
    assert tree(tmp_path) == before
    assert u4d(*command, "--dtype", "fp32", "--overwrite").code == 0
    assert load_file(tmp_path / "out" / FILE)["proj_out.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--from", "WAN", "--streams", "depth"), ["streams", "rgb"]),
        (("--from", "WAN", "--streams", "rgb", "audio"), ["audio"]),
        (("--from", "WAN", "--dtype", "fp16"), ["--dtype", "fp16"]),
        (("--from", "WAN", "--size", "240"), ["--size", "HEIGHTxWIDTH"]),
        (("--from", "WAN", "--size", "100x100"), ["image_size", "multiples of 16"]),
        (("--from", "WAN", "--frames", "0"), ["--frames"]),
        (("--from", "WAN", "--extract", "rgb"), ["expected a u4d Pipeline", "WanPipeline"]),
        (("--from", "tiny", "--extract", "audio"), ["stream", "audio"]),
        (("--from", "tiny", "--extract", "rgb", "--dtype", "fp32"), ["--extract", "--dtype"]),
        (("--from", "tiny"), ["tiny", "no such file or folder"]),
        (("--from", "nothing"), ["nothing", "expected a hub id"]),
        ((), ["--from"]),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    u4d: Command, wan: Path, tmp_path: Path, options: tuple[str, ...], words: list[str]
) -> None:
    outcome = u4d("init", *(str(wan) if option == "WAN" else option for option in options), "-o", tmp_path / "out")
    assert outcome.code == 2 and outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("u4d: error: ") and all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_refused_with_the_command_that_converts_it(u4d: Command, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "wan.pth")
    outcome = u4d("init", "--from", tmp_path / "wan.pth", "-o", tmp_path / "out")
    (line,) = outcome.err.splitlines()
    assert outcome.code == 2 and 'python -c "import sys, torch;' in line
    assert line.endswith(f'" {tmp_path / "wan.pth"} {tmp_path / "wan.safetensors"}')


def test_ctrl_c_leaves_nothing(u4d: Command, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("u4d.convert.from_wan.copy_part", interrupt)  # the transformer is written by then
    outcome = u4d("init", "--from", wan, "-o", tmp_path / "new" / "out")
    assert outcome.code == 130
    assert (
        outcome.err.strip().splitlines()[-1]
        == "u4d: interrupted; nothing was written; an older checkpoint is as it was"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_help_is_enough_to_use_it(u4d: Command) -> None:
    text = u4d("init", "--help").out
    options = (
        "--from --out --dtype --streams --frames --size --extract --overwrite bf16 fp32 rgb depth ray_dir ray_moment"
    )
    assert all(option in text for option in options.split())
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in text and "--extract rgb" in text
