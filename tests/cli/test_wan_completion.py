"""The way of a user with a Wan checkpoint: `u4d init`, `u4d complete` from it, and the same Wan back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from in_process import Command
from safetensors.torch import load_file

from convert.wan_folders import write_wan_folder
from u4d.scene import Scene

TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.mark.usefixtures("plain_summary")
def test_init_complete_extract(u4d: Command, scene_folder: Path, tmp_path: Path) -> None:
    wan, ours, back = (tmp_path / name for name in ("wan", "ours", "back"))
    write_wan_folder(wan)
    made = u4d("init", "--from", wan, "-o", ours, "--dtype", "fp32", "--frames", 6, "--size", "32x48")
    assert made.code == 0
    settings = ("--checkpoint", ours, "--device", "cpu", "--steps", 1, "--guidance", 1)
    scenes = {}
    for name, options in {"plain": (), "prompt": ("--prompt", "a red room")}.items():
        done = u4d("complete", scene_folder, "-o", tmp_path / name, *settings, *options)
        assert done.code == 0, done.err
        scenes[name] = Scene.load(tmp_path / name)
        assert scenes[name].num_frames == 6 and scenes[name].image_size == (32, 48)
        assert bool(torch.isfinite(scenes[name].depth).all()) and bool(torch.isfinite(scenes[name].cam_to_world).all())
    assert not torch.equal(scenes["plain"].depth, scenes["prompt"].depth)
    assert u4d("init", "--from", ours, "--extract", "rgb", "-o", back).code == 0
    source, returned = load_file(wan / TRANSFORMER), load_file(back / TRANSFORMER)
    assert source.keys() == returned.keys()
    assert all(torch.equal(source[name], returned[name]) for name in source)
    WanTransformer3DModel.from_pretrained(back / "transformer")
