"""Hub ids: what is downloaded, and that it gets the same checks as a folder."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import u4d
from u4d.checkpoint import download_checkpoint, find_checkpoint
from u4d.checkpoint_files import WEIGHTS
from u4d.errors import UserError


def give_snapshot(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Let the hub's client return a folder; what it is asked for is kept."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


@pytest.mark.parametrize("name", ("owner/name", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "some_one/u4d-tiny"))
def test_hub_ids_become_folders(debug_checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = give_snapshot(monkeypatch, debug_checkpoint)
    assert find_checkpoint(name) == debug_checkpoint
    ((repo, options),) = asked
    assert repo == name and not options["local_files_only"]
    patterns = options["allow_patterns"]
    assert any(fnmatch("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", one) for one in patterns)
    assert any(fnmatch("tokenizer/spiece.model", one) for one in patterns)
    for unwanted in ("Wan2.1_VAE.pth", "transformer/diffusion_pytorch_model.bin", "modeling.py", "assets/demo.mp4"):
        assert not any(fnmatch(unwanted, one) for one in patterns), unwanted


def test_what_comes_from_the_hub_is_checked_as_a_folder_is(
    debug_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_snapshot(monkeypatch, debug_checkpoint)
    loaded, local = (u4d.Pipeline.from_pretrained(name) for name in ("owner/name", debug_checkpoint))
    assert torch.equal(loaded.transformer.proj_out.weight, local.transformer.proj_out.weight)
    damaged = Path(shutil.copytree(debug_checkpoint, tmp_path / "damaged"))
    give_snapshot(monkeypatch, damaged)
    weights = damaged / "transformer" / WEIGHTS
    tensors = load_file(weights)
    del tensors["proj_out.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{weights}: tensor 'proj_out.weight' is missing"):
        u4d.Pipeline.from_pretrained("owner/name")
    (damaged / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"expected a diffusers folder with model_index.json"):
        u4d.Pipeline.from_pretrained("owner/name")


def test_a_hub_id_that_can_not_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        UserError, match=r"owner/name: no such folder here, nor loaded from the hub: We couldn't"
    ) as caught:
        find_checkpoint("owner/name")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"owner/name: no such folder here, nor downloaded before"):
        download_checkpoint("owner/name", cached_only=True)


def test_a_folder_may_be_named_like_a_hub_id(debug_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{debug_checkpoint.parent.name}/{debug_checkpoint.name}"
    monkeypatch.chdir(debug_checkpoint.parent.parent)
    assert find_checkpoint(name) == Path(name)
    assert u4d.Pipeline.from_pretrained(name).transformer is not None
