"""Runs whose clips have captions: resumed bit for bit, the same for any number of processes, and with their encoder
in the checkpoint that they leave."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import u4d
import u4d.train.data.captions as captions_module
from convert.wan_folders import write_wan_folder
from train.runs import losses, same_bits, saved, train, train_in_processes, train_until, write_pictures
from u4d.convert import init_from_wan
from u4d.errors import UserError
from u4d.presets import Preset, TransformerConfig, read_config
from u4d.text_encoder import CACHE_VARIABLE
from u4d.train.data.captions import DTYPE
from u4d.train.recipe import Compute, Data, FineTuning, Phase, Recipe, Source, debug_run
from u4d.train.state.consolidate import consolidate

CLIPS = {"red": "a red room", "long": "a long walk through a green garden with very many trees", "quiet": ""}
PHASE = Phase(steps=4, patterns={"joint": 1.0}, frames={3: 1.0, 6: 1.0})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """All weights of a small Wan2.1 with four streams, trained on three clips of which two are told."""
    folder = tmp_path_factory.mktemp("told")
    write_wan_folder(folder / "wan")
    init_from_wan(folder / "wan", folder / "u4d", torch.float32, num_frames=6, image_size=(32, 48))
    for name, caption in CLIPS.items():
        write_pictures(folder / "clips" / name, caption)
    config = json.loads((folder / "u4d" / "transformer" / "config.json").read_text())
    return replace(
        debug_run(),
        preset=Preset("small-wan", read_config(TransformerConfig, config), codec=None),
        phases=(PHASE,),
        data=Data((Source("scenes", path=str(folder / "clips")),), window=2, draws=1),
        start=FineTuning(str(folder / "u4d")),
        batch=2,
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; beside it, in `halfway`, one that was stopped after its first save."""
    folder = tmp_path_factory.mktemp("runs")
    train_until(recipe, folder / "halfway", 3)
    train(recipe, folder / "run")
    return folder / "run"


def test_a_resumed_run_hears_the_same_words(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where all embeddings have to be made again."""
    run = tmp_path / "run"
    shutil.copytree(finished.with_name("halfway"), run)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    train(recipe, run)
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 2
    assert same_bits(saved(finished), saved(run)) and torch.equal(losses(finished), losses(run))


def test_words_make_a_difference_and_may_be_hidden(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    """All captions hidden is a run on clips without any."""
    hidden = replace(recipe, phases=(replace(PHASE, null_text=1.0),))
    silent = replace(recipe, data=replace(recipe.data, sources=(Source("scenes", path=str(tmp_path / "clips")),)))
    for name in CLIPS:
        write_pictures(tmp_path / "clips" / name, "")
        shutil.rmtree(tmp_path / "clips" / name)
        shutil.copytree(Path(recipe.data.sources[0].path) / name, tmp_path / "clips" / name)
    for name, other in (("hidden", hidden), ("silent", silent)):
        train(other, tmp_path / name)
    assert torch.equal(losses(tmp_path / "hidden"), losses(tmp_path / "silent"))
    assert not torch.allclose(losses(finished)[:, 0], losses(tmp_path / "hidden")[:, 0], rtol=1e-4)


def test_a_run_does_not_go_on_with_another_encoder(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    run, old = tmp_path / "run", Path(recipe.start.checkpoint if recipe.start else "")
    shutil.copytree(finished.with_name("halfway"), run)
    tokenizer, encoder = captions_module.load_text_encoder(old, torch.float32)
    del tokenizer
    shutil.copytree(old / "text_encoder", tmp_path / "kept")
    try:
        with torch.no_grad():
            encoder.shared.weight += 1
        encoder.save_pretrained(old / "text_encoder")
        with pytest.raises(UserError, match="this state belongs to another run: text encoder: expected"):
            train(recipe, run)
    finally:
        shutil.rmtree(old / "text_encoder")
        shutil.copytree(tmp_path / "kept", old / "text_encoder")


def test_the_checkpoint_keeps_encoder_and_tokenizer_byte_for_byte(recipe: Recipe, finished: Path) -> None:
    checkpoint, old = finished / "checkpoint", Path(recipe.start.checkpoint if recipe.start else "")
    for part in ("text_encoder", "tokenizer"):
        files = {file.name: file.read_bytes() for file in (old / part).iterdir()}
        assert {file.name: file.read_bytes() for file in (checkpoint / part).iterdir()} == files and files
    index, before = (json.loads((folder / "model_index.json").read_text()) for folder in (checkpoint, old))
    assert index.keys() == before.keys() and index["text_encoder"] == before["text_encoder"]
    pipe = u4d.Pipeline.from_pretrained(checkpoint)
    told = pipe.encode_text("a red room")
    assert told is not None and bool(told.any())
    out = pipe.complete(u4d.Scene(rgb=torch.rand(6, 3, 32, 48)), steps=1, prompt="a red room")
    assert out.caption == "a red room" and bool(torch.isfinite(out.depth).all())


def test_an_export_keeps_them_too(finished: Path, tmp_path: Path) -> None:
    contents = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (consolidate(finished, tmp_path / "out"), finished / "checkpoint")
    ]
    assert contents[0] == contents[1]
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_training_and_inference_encode_alike(recipe: Recipe, finished: Path) -> None:
    old = Path(recipe.start.checkpoint if recipe.start else "")
    pipe = u4d.Pipeline.from_pretrained(old)
    length, words = pipe.transformer.config.text_length, CLIPS["long"]
    told = pipe.encode_text(words)
    assert told is not None and told.dtype == DTYPE
    known = captions_module.Captions(
        captions_module.cache_folder(), captions_module.content_key(old, "", DTYPE, length)
    )
    mine = known.embeddings(words)
    assert torch.equal(mine, told[0, : len(mine)]) and not told[0, len(mine) :].any()


@pytest.mark.slow
def test_two_processes_hear_what_one_does(recipe: Recipe, tmp_path: Path) -> None:
    """Each encodes its share, and each micro-batch has prompts of other lengths."""
    exact = replace(recipe, batch=4, compute=Compute(precision="fp32"))
    train(exact, tmp_path / "one")
    train_in_processes(replace(exact, compute=Compute(precision="fp32", micro_batch=1)), tmp_path / "two", 2)
    assert torch.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-5)
