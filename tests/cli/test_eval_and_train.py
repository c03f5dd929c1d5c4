"""`u4d eval` and `u4d train`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_process import Command, tree

from u4d.commands import eval as eval_verb
from u4d.model.codec import TinyCodec

QUICK = ("--clips", 2, "--steps", 1, "--device", "cpu")


@pytest.fixture(autouse=True)
def few_training_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_verb, "PRIOR_CLIPS", 3)


def test_eval_prints_and_writes_the_model_beside_trivial_rows_and_its_codec(
    u4d: Command, debug_checkpoint: Path, tmp_path: Path
) -> None:
    files = (tmp_path / "new" / "report.json", tmp_path / "report.md")
    done = u4d("eval", "--checkpoint", debug_checkpoint, *QUICK, "--json", files[0], "--markdown", files[1])
    assert (done.code, done.err) == (0, "")
    for text in ("AbsRel", "ATE", "mean depth map", "straight line", "fitted on 3 training clips", "PSNR, dB"):
        assert text in done.out and text in files[1].read_text()
    report = json.loads(files[0].read_text())
    assert (report["split"], report["model"]["clips"], report["codec"]["clips"]) == ("test", 2, 2)
    assert report["model"]["rows"][0]["metrics"]["abs_rel"]["count"] == 2
    assert set(report["codec"]["rows"][0]["metrics"]) >= {"psnr", "psnr_depth"}


def test_eval_of_a_task_scores_what_it_leaves_open(u4d: Command, debug_checkpoint: Path) -> None:
    done = u4d("eval", "--checkpoint", debug_checkpoint, *QUICK, "--task", "camera_control", "--split", "val")
    assert done.code == 0
    assert "frame blend" in done.out and "translation direction" not in done.out


def test_eval_with_halving_gives_candidates_up(u4d: Command, debug_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--clips", 1, "--steps", 2, "--device", "cpu", "--candidates", 4, "--json", tmp_path / "report.json")
    done = u4d("eval", "--checkpoint", debug_checkpoint, *options, "--halving")
    assert (done.code, done.err) == (0, "") and "candidates 4, seed 0" in done.out and "halving 4 -> 1" in done.out
    assert json.loads((tmp_path / "report.json").read_text())["model"]["settings"]["halving"] == "4 -> 1"


def test_halving_of_eval_is_that_of_the_pipeline() -> None:
    asked: list[dict[str, object]] = []
    pipe = SimpleNamespace(complete=lambda scene, **settings: asked.append(settings) or scene)
    assert eval_verb.WithHalving(pipe).complete("a scene", seed=3) == "a scene"
    assert asked == [{"halving": True, "seed": 3}]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--observe", "rgb:77"), "rgb:77"),
        (("--halving",), "halving: expected at least 2 candidates"),
        (("--halving", "--candidates", 4), "halving: expected more than 1 steps"),
        (("--clips", 2000), "--clips"),
        (("--task", "slam"), "--task"),
        (("--json", "/proc/u4d/report.json"), "/proc/u4d"),
        (("--markdown", "/"), "folder"),
        (("--checkpoint", "nothing"), "nothing"),
    ],
)
def test_eval_tells_mistakes_before_the_work(
    options: tuple[object, ...], word: str, u4d: Command, debug_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("u4d.evaluate.evaluate", lambda *args, **options: pytest.fail("the long work began"))
    outcome = u4d("eval", "--checkpoint", debug_checkpoint, *QUICK, *options)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert word in line


def test_the_codec_is_given_clips_as_it_wants_them(debug_checkpoint: Path) -> None:
    codec = TinyCodec.from_pretrained(debug_checkpoint / "vae")
    rgb = torch.rand(6, 3, 32, 48)
    around = eval_verb.ThereAndBack(codec, torch.device("cpu"))
    with torch.no_grad():
        expected = codec.decode(codec.encode(rgb[None] * 2 - 1, "rgb"), "rgb", 6)[0] / 2 + 0.5
    assert torch.allclose(around.reconstruct_rgb(rgb), expected, atol=1e-6)
    depth = torch.rand(6, 32, 48) * 2 - 1
    assert around.reconstruct_depth(depth).shape == depth.shape


def test_training_makes_a_checkpoint_that_eval_takes(u4d: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = u4d("train", "debug", "-o", run, "--workers", 0)
    assert done.code == 0 and str(run / "checkpoint") in done.out
    assert len((run / "log.jsonl").read_text().splitlines()) == 4
    assert u4d("eval", "--checkpoint", run / "checkpoint", *QUICK).code == 0


def test_training_keeps_out_of_folders_that_are_no_run(u4d: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.json").write_text("{}")
    before = tree(tmp_path)
    for recipe, folder, word in (
        ("huge", "new", "tiny_procedural"),
        ("debug", "mine", "mine"),
        ("debug", "other", "another recipe"),
        ("debug", "mine/notes.txt", "notes.txt"),
    ):
        outcome = u4d("train", recipe, "-o", tmp_path / folder, "--workers", 0)
        assert outcome.code == 2 and word in outcome.err and len(outcome.err.splitlines()) == 1
    assert tree(tmp_path) == before


def test_an_interrupted_training_says_how_to_go_on(
    u4d: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("u4d.train.loop.train", interrupt)
    outcome = u4d("train", "debug", "-o", tmp_path / "run")
    assert outcome.code == 130 and "goes on from there" in outcome.err
