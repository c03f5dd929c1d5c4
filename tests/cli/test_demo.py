"""`u4d demo`, and the example clip that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from in_process import Command

from u4d.commands import comparison
from u4d.commands.demo import EXAMPLE
from u4d.data import ProceduralScenes
from u4d.scene import Scene

pytestmark = pytest.mark.usefixtures("plain_summary")


def test_the_example_is_small_and_holds_the_truth() -> None:
    assert sum(file.stat().st_size for file in EXAMPLE.rglob("*")) < 1.5e6
    scene = Scene.load(EXAMPLE)
    assert scene.num_frames == 18 and scene.image_size == (192, 256)
    assert not scene.frames_without_depth
    assert scene.intrinsics is not None and scene.cam_to_world is not None


def test_the_example_is_what_our_renderer_makes() -> None:
    stored = Scene.load(EXAMPLE)
    index = int(stored.caption.rstrip(")").split()[-1])
    path = ProceduralScenes("test", frames=18, size=(8, 8))[index].cam_to_world
    assert torch.allclose(stored.cam_to_world, path, atol=1e-5)
    first = ProceduralScenes("test", frames=1, size=stored.image_size)[index]
    assert torch.allclose(stored.intrinsics[0], first.intrinsics[0], rtol=1e-5)
    assert (stored.rgb[0] - first.rgb[0]).abs().mean() < 0.02
    same = (stored.depth[0] / first.depth[0] - 1).abs() < 1e-3
    assert same.float().mean() > 0.999


def test_the_demo_completes_the_example_and_prints_its_errors(
    u4d: Command, debug_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison.training_averages, "__defaults__", (4,))
    out = tmp_path / "demo"
    done = u4d("demo", "-o", out, "--checkpoint", debug_checkpoint)
    assert (done.code, done.err) == (0, "")
    rows = ("mean depth map", "constant depth", "static camera", "straight line", "mean motion")
    metrics = ("AbsRel", "delta < 1.25", "ATE", "rotation first to last", "translation direction")
    for text in (*rows, *metrics, "depth alignment: scale", "seconds", "denoise", str(out / "summary.png")):
        assert text in done.out
    report = json.loads((out / "scene.json").read_text())["report"]
    assert report["source"]["observe"] == "rgb:all" and report["steps"] == 40
    assert report["evaluation"]["rows"][0]["metrics"]["ate"]["count"] == 1


def test_the_demo_takes_the_users_clip_and_replaces_only_an_older_demo(
    u4d: Command, debug_checkpoint: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        done = u4d("demo", "--clip", video, "--checkpoint", debug_checkpoint)
        assert done.code == 0 and "against the truth" not in done.out
    assert Scene.load(tmp_path / "out" / "demo").report["source"]["path"] == str(video)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    refused = u4d("demo", "--clip", video, "-o", tmp_path / "mine", "--checkpoint", debug_checkpoint)
    assert refused.code == 2 and (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    missing = u4d("demo", "--clip", tmp_path / "no.mp4", "--checkpoint", debug_checkpoint)
    assert missing.code == 2 and "no.mp4" in missing.err
