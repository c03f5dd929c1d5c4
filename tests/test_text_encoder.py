"""Prompts to embeddings: as diffusers' own Wan pipeline makes them, kept on disk, and loaded only when asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from convert.wan_folders import write_wan_folder
from u4d import text_encoder
from u4d.errors import UserError
from u4d.text_encoder import CACHE_VARIABLE, clean_prompt, encode_prompt

PROMPT = "a  red car,\n turning &amp; turning."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan_folder(tmp_path_factory.mktemp("wan"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.mark.parametrize("prompt", (PROMPT, "", "word " * 200))
def test_equals_diffusers_wan_pipeline(folder: Path, prompt: str) -> None:
    pipe = WanPipeline.from_pretrained(folder)
    with torch.no_grad():
        truth = pipe._get_t5_prompt_embeds(prompt, max_sequence_length=512)[0]
    ours = encode_prompt(folder, prompt)
    assert len(ours) == (1 if prompt == "" else min(512, len(clean_prompt(prompt)) + 2))
    torch.testing.assert_close(ours, truth[: len(ours)], rtol=1e-5, atol=1e-5)
    assert not truth[len(ours) :].any()


def test_the_second_answer_comes_from_disk(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode_prompt(folder, PROMPT)
    monkeypatch.setattr(text_encoder, "load_text_encoder", lambda *_: pytest.fail("loaded again"))
    assert torch.equal(encode_prompt(folder, PROMPT), first)
    assert torch.equal(encode_prompt(folder, "a red car, turning & turning."), first)  # the same words when cleaned
    assert len(list(cache.iterdir())) == 1


def test_other_words_weights_and_types_are_other_answers(folder: Path, cache: Path, tmp_path: Path) -> None:
    first = encode_prompt(folder, PROMPT)
    assert not torch.equal(encode_prompt(folder, "a blue car")[:4], first[:4])
    other = write_wan_folder(tmp_path / "other", seed=5, vae=False)
    assert not torch.equal(encode_prompt(other, PROMPT), first)
    assert encode_prompt(folder, PROMPT, torch.bfloat16).dtype == torch.bfloat16
    assert len(encode_prompt(folder, PROMPT, max_tokens=4)) == 4
    assert len(list(cache.iterdir())) == 5


def test_a_moved_checkpoint_keeps_its_answers(folder: Path, cache: Path, tmp_path: Path) -> None:
    encode_prompt(folder, PROMPT)
    encode_prompt(Path(shutil.copytree(folder, tmp_path / "copy")), PROMPT)
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_answer_is_made_again(folder: Path, cache: Path) -> None:
    first = encode_prompt(folder, PROMPT)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert torch.equal(encode_prompt(folder, PROMPT), first)
    assert torch.equal(encode_prompt(folder, PROMPT), first)


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert len(encode_prompt(folder, PROMPT)) > 1
    assert "not kept" in caplog.text


def test_a_damaged_encoder_is_named(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    weights = broken / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="text encoder can't be loaded"):
        encode_prompt(broken, PROMPT)


def test_without_transformers_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'u4d\[text\]'"):
        encode_prompt(folder, PROMPT)
