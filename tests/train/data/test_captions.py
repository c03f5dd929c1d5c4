"""Captions in training: encoded once and before the run, then taken as exactly as a prompt at inference."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import u4d.train.data.captions as captions_module
from convert.wan_folders import write_wan_folder
from train.runs import write_pictures
from u4d.errors import UserError
from u4d.model.transformer import Transformer
from u4d.presets import debug
from u4d.text_encoder import CACHE_VARIABLE, encode_prompt
from u4d.train.data.captions import Captions, caption_of, join_prompts, prepare_captions
from u4d.train.data.samples import TrainingClips, draw_samples, draw_texts
from u4d.train.data.sources import open_sources, read_clips
from u4d.train.recipe import Data, Phase, Source, debug_run
from u4d.train.world import World

WORDS = ("a red room.", "a long walk through a green garden with trees", "sea")
HERE = World(torch.device("cpu"))
WIDTH, LENGTH = 16, 40
PHASE = Phase(steps=9, patterns={"joint": 1.0}, frames={3: 1.0}, null_text=0.3)
RECIPE = replace(debug_run(), phases=(PHASE,), batch=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small UMT5 whose embeddings are 16 wide."""
    return write_wan_folder(tmp_path_factory.mktemp("wan"), vae=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


def write_clips(folder: Path, words: Sequence[str] = WORDS) -> list[Path]:
    """Text files beside videos: before a run nothing else of them is read."""
    folder.mkdir(exist_ok=True)
    videos = [folder / f"{number}.mp4" for number in range(len(words))]
    for video, caption in zip(videos, words, strict=True):
        video.with_suffix(".txt").write_text(caption)
    return videos


def prepare(clips: Sequence[Path], checkpoint: Path | None, world: World = HERE, width: int = WIDTH) -> Captions | None:
    return prepare_captions(clips, checkpoint, LENGTH, width, world, progress=False)


def test_a_caption_is_the_scenes_own_or_that_of_a_text_file_beside_it(tmp_path: Path) -> None:
    for name in ("scene", "take.2", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "scene" / "scene.json").write_text(json.dumps({"caption": " red &amp; blue\n walls "}))
    (tmp_path / "scene.txt").write_text("somebody else's")
    (tmp_path / "take.2.txt").write_text("the second take")
    (tmp_path / "broken" / "scene.json").write_text("{")
    (tmp_path / "clip.txt").write_text("a clip\n")
    names = ("scene", "take.2", "clip.mp4", "broken", "other.mp4")
    wanted = ["red & blue walls", "the second take", "a clip", "", ""]
    assert [caption_of(tmp_path / name) for name in names] == wanted


def test_clips_come_with_their_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path / "red", "a red wall")
    write_pictures(tmp_path / "quiet", "")
    recipe = replace(RECIPE, data=Data((Source("scenes", path=str(tmp_path)), Source()), window=2))
    sources = open_sources(recipe)
    assert sorted(path.name for path in sources.clips) == ["quiet", "red"]
    clips = read_clips(sources, range(12)).clips
    assert clips is not None and set(clips.captions) == {"", "a red wall"}
    told = [index for index, words in enumerate(clips.captions) if words]
    assert clips.pick(torch.tensor(told)).captions == ("a red wall",) * len(told)
    assert clips.pick(slice(told[0], told[0] + 1)).captions == ("a red wall",)
    samples = draw_samples(recipe, 0, range(12), clips)
    assert samples.texts == (None,) * 12 and samples.clips.captions == clips.captions


def test_each_caption_is_encoded_once_as_a_prompt_would_be(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = write_clips(tmp_path / "clips", (*WORDS, WORDS[0], ""))
    known = prepare(clips, checkpoint)
    assert known is not None
    for words in WORDS:
        truth = encode_prompt(checkpoint, words, torch.bfloat16, max_tokens=LENGTH, cache=tmp_path / "prompts")
        assert torch.equal(known.embeddings(words), truth) and len(truth) == min(LENGTH, len(words) + 2)
    assert len(list(known.cache.iterdir())) == len(WORDS)
    encoded: list[str] = []
    real = captions_module.embed
    monkeypatch.setattr(captions_module, "embed", lambda *parts: encoded.append(parts[2]) or real(*parts))
    more = write_clips(tmp_path / "more", ("a new one", *WORDS))
    known.file(WORDS[2]).write_bytes(b"torn")
    assert prepare(more, checkpoint) == known and encoded == ["a new one", WORDS[2]]
    monkeypatch.setattr(captions_module, "load_text_encoder", lambda *_: pytest.fail("loaded again"))
    assert prepare(more, checkpoint) == known


def test_no_encoder_stays_in_memory(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    real = captions_module.load_text_encoder

    def note(*parts: Any) -> Any:
        tokenizer, encoder = real(*parts)
        loaded.append(weakref.ref(encoder.shared.weight))
        return tokenizer, encoder

    monkeypatch.setattr(captions_module, "load_text_encoder", note)
    assert prepare(write_clips(tmp_path / "clips"), checkpoint) is not None
    assert len(loaded) == 1 and loaded[0]() is None


def test_where_nothing_is_told_there_is_nothing_to_encode(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions_module, "load_text_encoder", lambda *_: pytest.fail("loaded"))
    assert prepare(write_clips(tmp_path / "clips"), None) is None
    assert prepare(write_clips(tmp_path / "quiet", ("", " \n")), checkpoint) is None
    assert prepare([], checkpoint) is None


def test_processes_share_the_work(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process encodes its share while the first waits for it."""
    clips, shares = write_clips(tmp_path / "clips"), []
    real = captions_module.encode_captions

    def note(known: Captions, folder: Path, mine: Sequence[str], *others: object) -> None:
        shares.append(list(mine))
        real(known, folder, mine, *others)

    monkeypatch.setattr(captions_module, "encode_captions", note)

    class Two(World):
        def wait(self) -> None:
            if shares == [sorted(WORDS)[0::2]]:  # the first has done its own and waits
                shares.append(sorted(WORDS)[1::2])
                real(Captions(tmp_path / "cache" / "text", key), checkpoint, shares[-1], LENGTH, self.device, False)

    known = prepare(write_clips(tmp_path / "one", ("one",)), checkpoint)
    assert known is not None
    key = known.encoder
    shares.clear()
    assert prepare(clips, checkpoint, Two(torch.device("cpu"), 0, 2)) == known
    assert sorted(shares[0] + shares[1]) == sorted(WORDS) and len(shares) == 2


def test_embeddings_that_can_not_be_kept_or_fit_are_told(checkpoint: Path, tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips")
    with pytest.raises(UserError, match="expected embeddings of width 4096, got 16"):
        prepare(clips, checkpoint, width=4096)
    known = prepare(clips, checkpoint)
    assert known is not None
    known.file(WORDS[0]).unlink()
    with pytest.raises(UserError, match=r"expected the embeddings of 'a red room\.', which were there"):
        known.embeddings(WORDS[0])
    for file in known.cache.iterdir():
        file.unlink()
    known.cache.rmdir()
    known.cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"of 3 captions, 3 of them are not there; set U4D_CACHE"):
        prepare(clips, checkpoint)


class Known:
    """Every caption's embeddings are its letters."""

    def embeddings(self, caption: str) -> Tensor:
        return torch.tensor([[float(ord(letter))] for letter in caption])


def texts_of(step: int, places: range, words: Sequence[str]) -> list[str | None]:
    drawn = draw_texts(RECIPE, step, places, words, Known())  # type: ignore[arg-type]
    return [None if text is None else "".join(chr(int(letter)) for letter in text[:, 0]) for text in drawn]


def test_some_captions_are_hidden_by_seed_step_and_place() -> None:
    words = [f"clip {place}" if place % 4 else "" for place in range(2000)]
    drawn = texts_of(3, range(2000), words)
    told = [place for place in range(2000) if words[place]]
    assert all(drawn[place] in (None, words[place]) for place in range(2000))
    assert sum(drawn[place] is None for place in told) / len(told) == pytest.approx(0.3, abs=0.04)
    assert (
        drawn[500:600] == texts_of(3, range(500, 600), words[500:600]) != texts_of(4, range(500, 600), words[500:600])
    )
    assert draw_texts(RECIPE, 3, range(5), words[:5], None) == (None,) * 5
    assert Phase(steps=1, patterns={"joint": 1.0}, frames={1: 1.0}).null_text == 0.1


def test_captions_change_nothing_else_that_is_drawn() -> None:
    clips = read_clips(open_sources(RECIPE), range(4)).clips
    assert clips is not None
    told = TrainingClips(clips.clips, clips.available, clips.numbers, tuple("abcd"))
    plain, spoken = draw_samples(RECIPE, 1, range(4), clips), draw_samples(RECIPE, 1, range(4), told, "cpu", Known())  # type: ignore[arg-type]
    assert torch.equal(plain.noise, spoken.noise) and torch.equal(plain.task.times, spoken.task.times)
    for mine, theirs in zip(plain.clips.clips.everything(), spoken.clips.clips.everything(), strict=True):
        assert torch.equal(mine, theirs)
    assert any(text is not None for text in spoken.texts)
    assert [part.texts for part in spoken.split(3)] == [spoken.texts[:3], spoken.texts[3:]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A model that fills prompts up with zeros; its head is not zero and it has a null text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = debug().transformer
        found = Transformer(replace(config, text_dim=WIDTH, text_length=LENGTH)).eval()
        found.null_text.normal_()
    return found


@torch.no_grad()
def test_prompts_of_all_lengths_in_one_batch_are_exact(model: Transformer) -> None:
    """Beside each other, alone, filled up with zeros, as inference takes them: all the same velocity."""
    generator = torch.Generator().manual_seed(0)
    texts = [None, *(torch.randn(length, WIDTH, generator=generator) for length in (1, 7, LENGTH - 1, LENGTH))]
    latents = torch.randn(len(texts), 4, 16, 2, 4, 6, generator=generator)
    times = torch.rand(len(texts), 4, 2, generator=generator)
    prompt = join_prompts(texts, model.null_text, LENGTH, torch.float32)
    assert prompt is not None and prompt.embeddings.shape == (5, 64, WIDTH)
    together = model(latents, times, text=prompt)
    for row, text in enumerate(texts):
        one = (latents[row : row + 1], times[row : row + 1])
        padded = torch.zeros(1, LENGTH, WIDTH)
        padded[0, : 1 if text is None else len(text)] = model.null_text if text is None else text
        for other in (padded, model.text_keys(padded), *([None] if text is None else [])):
            torch.testing.assert_close(together[row : row + 1], model(*one, other), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[row], together[row - 1], atol=1e-3)


def test_a_batch_without_words_is_left_to_the_model(model: Transformer) -> None:
    assert join_prompts([None, None], model.null_text, LENGTH, torch.float32) is None


def test_padding_is_counted_as_bfloat16_has_it(model: Transformer) -> None:
    prompt = join_prompts([torch.ones(3, WIDTH)], model.null_text, LENGTH, torch.bfloat16)
    assert prompt is not None and prompt.bias is not None
    weights = prompt.bias.bfloat16().double().exp().sum()
    assert float(weights) == pytest.approx(LENGTH, rel=2e-3)
