"""`--lora FOLDER`: adapters over a checkpoint, wherever a checkpoint is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_process import Command

import u4d as package
from u4d.checkpoint import save_checkpoint
from u4d.errors import UserError
from u4d.model.lora import LoRAConfig, add_lora, lora_parameters
from u4d.model.lora_folder import save_lora

QUICK = ("--steps", 1, "--device", "cpu")


@pytest.fixture
def adapter(debug_checkpoint: Path, tmp_path: Path) -> Path:
    """Adapters that change a lot."""
    pipe = package.Pipeline.from_pretrained(debug_checkpoint)
    add_lora(pipe.transformer, LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in lora_parameters(pipe.transformer).values():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    save_lora(pipe.transformer, tmp_path / "adapter")
    with pytest.raises(UserError, match="merge_lora"):
        save_checkpoint(tmp_path / "checkpoint", pipe.transformer, pipe.vae, torch.float32)
    return tmp_path / "adapter"


def test_complete_and_eval_take_adapters(u4d: Command, debug_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    scene = package.Scene(rgb=torch.rand(6, 3, 32, 48, generator=torch.Generator().manual_seed(0)))
    scene.save(tmp_path / "scene")
    depths = []
    for name, options in (("plain", ()), ("adapted", ("--lora", adapter))):
        arguments = ("complete", tmp_path / "scene", "-o", tmp_path / name, "--checkpoint", debug_checkpoint)
        assert u4d(*arguments, *QUICK, *options).code == 0
        depths.append(package.Scene.load(tmp_path / name).depth)
    assert not torch.allclose(*depths, atol=1e-3)
    assert u4d("eval", "--checkpoint", debug_checkpoint, "--lora", adapter, "--clips", 2, *QUICK).code == 0


def test_adapters_of_another_checkpoint_are_refused(u4d: Command, adapter: Path, tmp_path: Path) -> None:
    package.Scene(rgb=torch.rand(6, 3, 32, 48)).save(tmp_path / "scene")
    done = u4d(
        "complete", tmp_path / "scene", "-o", tmp_path / "out", "--checkpoint", "tiny", "--lora", adapter, *QUICK
    )
    assert done.code == 2 and str(adapter) in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
