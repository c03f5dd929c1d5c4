"""`u4d complete`: what it writes, what it prints, and which frames it takes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import FRAMES, SIZE, Command, tree

from u4d.commands.clip import keep_frames, read_clip
from u4d.commands.console import Bars
from u4d.commands.output import check_file_output, check_run_output, check_scene_output, write_text
from u4d.data import tum
from u4d.errors import UserError
from u4d.sample.observation import parse_observation
from u4d.scene import Scene

plain_summary = pytest.mark.usefixtures("plain_summary")


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scene.json").read_text())["report"]


def test_a_video_becomes_a_saved_scene_and_a_table(complete: Command, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "result"
    done = complete(video, "-o", out)
    assert (done.code, done.err) == (0, "")
    parts = {"scene.json", "rgb.mp4", "depth.npz", "depth.mp4", "trajectory.tum", "points.ply", "summary.png"}
    assert parts <= {path.name for path in out.iterdir()}
    scene = Scene.load(out)
    assert scene.num_frames == FRAMES and scene.image_size == SIZE
    assert all(torch.isfinite(part).all() for part in (scene.depth, scene.intrinsics, scene.cam_to_world))
    source = report_of(out)["source"]
    assert source["frames"] == 10 and source["kept"] == [0, 2, 4, 5, 7, 9] and source["observe"] == "rgb:all"
    assert "10 frames, of which 6 are taken" in done.out
    facts = "frames size lengths depth path turn field reprojection seconds memory written"
    shown = {line.split()[0] for line in done.out.splitlines() if line.strip()}
    assert not [word for word in facts.split() if word not in {name.strip(",") for name in shown}]
    assert "relative" in done.out and str(out) in done.out
    seconds = next(line for line in done.out.splitlines() if line.startswith("seconds"))
    assert all(stage in seconds for stage in ("load", "denoise", "decode", "save"))
    assert list(tmp_path.iterdir()) == [tmp_path / "new"] and list((tmp_path / "new").iterdir()) == [out]


@plain_summary
def test_the_same_seed_gives_the_same_result_and_a_task_is_its_spec(
    complete: Command, video: Path, tmp_path: Path
) -> None:
    runs = {
        "spec": ("--observe", "rgb:0,-1", "--seed", 3),
        "task": ("--task", "interpolate", "--seed", 3),
        "other": ("--observe", "rgb:0,-1", "--seed", 4),
    }
    depth = {}
    for name, options in runs.items():
        assert complete(video, "-o", tmp_path / name, *options).code == 0
        depth[name] = Scene.load(tmp_path / name).depth
    assert torch.equal(depth["spec"], depth["task"])
    assert not torch.equal(depth["spec"], depth["other"])


@plain_summary
def test_candidates_are_listed_and_the_kept_one_is_marked(complete: Command, video: Path, tmp_path: Path) -> None:
    done = complete(video, "-o", tmp_path / "out", "--candidates", 3)
    report = report_of(tmp_path / "out")
    lines = done.out[done.out.index("candidate  ") :].splitlines()[2:5]
    for k, line in enumerate(lines):
        assert line.split()[0] == str(k) and f"{report['errors'][k]:.4f}" in line
        assert line.endswith("kept") == (k == report["best"])


@plain_summary
def test_halving_tells_who_went_on(complete: Command, video: Path, tmp_path: Path) -> None:
    done = complete(video, "-o", tmp_path / "out", "--candidates", 4, "--halving")
    report = report_of(tmp_path / "out")
    assert [cut["after"] for cut in report["halving"]] == [1] and report["finished"] == [report["best"]]
    lines = done.out[done.out.index("after step") :].splitlines()[2:3]
    for cut, line in zip(report["halving"], lines, strict=True):
        assert line.split()[:2] == [str(cut["after"]), str(len(cut["candidates"]))]
        assert line.endswith(", ".join(map(str, cut["kept"])))
    wrong = complete(video, "-o", tmp_path / "other", "--halving")
    assert wrong.code == 2 and "halving: expected at least 2 candidates" in wrong.err
    assert not (tmp_path / "other").exists()


@plain_summary
def test_results_come_lossless_and_at_the_inputs_size_on_request(
    complete: Command, video: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert complete(video, "-o", out, "--original-size", "--lossless", "--frames", 3).code == 0
    scene = Scene.load(out)
    assert scene.num_frames == 3 and scene.image_size == (64, 96)
    assert len(list((out / "rgb").glob("*.png"))) == 3


@plain_summary
def test_fp8_changes_the_result_a_little_and_is_told(complete: Command, video: Path, tmp_path: Path) -> None:
    scenes = {}
    for precision in ("exact", "fp8"):
        assert complete(video, "-o", tmp_path / precision, "--precision", precision, "--frames", 3).code == 0
        assert report_of(tmp_path / precision)["precision"] == precision
        scenes[precision] = Scene.load(tmp_path / precision).depth
    assert 0 < float((scenes["fp8"] / scenes["exact"]).log().abs().median()) < 0.05


@plain_summary
def test_an_older_result_stays_unless_overwrite_is_asked_for(complete: Command, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert complete(video, "-o", out, "--frames", 2).code == 0
    before = tree(tmp_path)
    refused = complete(video, "-o", out)
    assert refused.code == 2 and str(out) in refused.err and "--overwrite" in refused.err
    assert tree(tmp_path) == before
    assert complete(video, "-o", out, "--overwrite").code == 0
    assert Scene.load(out).num_frames == FRAMES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_the_input_knows_beyond_the_observed_is_compared(
    complete: Command, scene_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = complete(scene_folder, "-o", out, "--seed", 1)
    assert done.code == 0
    for text in ("depth against the truth", "camera against the truth", "AbsRel", "static camera", "depth alignment"):
        assert text in done.out
    evaluation = report_of(out)["evaluation"]
    assert evaluation["rows"][0]["name"] == "model" and "abs_rel" in evaluation["rows"][0]["metrics"]
    assert (out / "summary.png").stat().st_size > 10_000
    # the result knows depth and cameras too, but as guesses: they are no truth
    again = complete(out, "-o", tmp_path / "again")
    assert again.code == 0 and "against the truth" not in again.out


@plain_summary
def test_only_what_is_not_observed_is_compared(complete: Command, scene_folder: Path, tmp_path: Path) -> None:
    done = complete(scene_folder, "-o", tmp_path / "out", "--observe", "rgb:0,-1,depth:all,camera:all")
    assert "images against the truth" in done.out and "PSNR" in done.out
    assert "AbsRel" not in done.out and "ATE" not in done.out
    assert "metric" in done.out and "depth, 2 to 98 %" in done.out
    depth = Scene.load(tmp_path / "out").depth
    assert torch.equal(depth, Scene.load(scene_folder).depth)


@plain_summary
def test_a_camera_path_is_observed_unless_told_otherwise(
    complete: Command, video: Path, known: Scene, tmp_path: Path
) -> None:
    cameras = tmp_path / "cameras.json"
    cameras.write_text(json.dumps(nerfstudio(known, 10)))
    assert complete(video, "-o", tmp_path / "observed", "--cameras", cameras).code == 0
    assert report_of(tmp_path / "observed")["source"]["observe"] == "rgb:all,camera:all"
    assert report_of(tmp_path / "observed")["metric"] is True
    compared = complete(video, "-o", tmp_path / "compared", "--cameras", cameras, "--task", "pose")
    assert report_of(tmp_path / "compared")["metric"] is False
    assert "camera against the truth" in compared.out


def nerfstudio(scene: Scene, frames: int) -> dict[str, Any]:
    """A transforms.json with a straight path for a video of so many frames of 64x96."""
    poses = torch.eye(4).repeat(frames, 1, 1)
    poses[:, 0, 3] = torch.linspace(0, 1, frames)
    entries = [{"file_path": f"{i:06d}.png", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)]
    return {"fl_x": 80, "fl_y": 80, "cx": 48, "cy": 32, "w": 96, "h": 64, "frames": entries}


def test_a_trajectory_without_intrinsics_can_not_be_observed(
    complete: Command, video: Path, known: Scene, tmp_path: Path
) -> None:
    poses = torch.eye(4).repeat(10, 1, 1)
    poses[:, 2, 3] = torch.linspace(0, 1, 10)
    tum.write_path(tmp_path / "path.tum", poses, 20.0)
    outcome = complete(video, "-o", tmp_path / "out", "--cameras", tmp_path / "path.tum")
    assert outcome.code == 2 and "path.tum" in outcome.err and "intrinsics" in outcome.err
    assert not (tmp_path / "out").exists()


# --- frames of a longer input ----------------------------------------------------------------------------------------


def test_indices_are_those_of_the_input(video: Path) -> None:
    clip = read_clip(video, None, "rgb:0,4,9", most=6)
    assert clip.observation.rgb.tolist() == [True, False, True, False, False, True]
    assert clip.scene.num_frames == 6 and not clip.notes and not clip.completed
    shades = clip.scene.rgb.mean((1, 2, 3))
    assert torch.allclose(shades, torch.tensor([0, 2, 4, 5, 7, 9]) / 9, atol=0.03)


def test_observed_frames_that_are_not_taken_are_told() -> None:
    observation, notes = keep_frames(parse_observation("rgb:0,1,2 depth:all", 10), [0, 2, 4])
    assert observation.rgb.tolist() == [True, True, False]
    (note,) = notes  # "all" loses nothing that anybody named
    assert note.startswith("rgb: 1 of 3")
    with pytest.raises(UserError, match=r"observe: none of the 1 observed camera frames .* 0, 2, 4; observe one"):
        keep_frames(parse_observation("rgb:0 camera:3", 10), [0, 2, 4])


def test_a_longer_saved_scene_is_cut_down_too(scene_folder: Path) -> None:
    clip = read_clip(scene_folder, None, "rgb:all,depth:0", most=3)
    assert clip.source["frames"] == FRAMES and clip.source["kept"] == [0, 3, 5]
    assert clip.scene.num_frames == 3 and clip.scene.depth.shape[0] == 3
    assert clip.scene.fps == pytest.approx(24 * 2 / 5)  # it lasts as long as before
    assert clip.observation.depth.tolist() == [True, False, False]


# --- the terminal ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@plain_summary
def test_bars_show_on_a_terminal_and_nowhere_else(
    complete: Command, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complete(video, "-o", tmp_path / "file").err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    complete(video, "-o", tmp_path / "terminal")
    assert "denoise" in terminal.getvalue()


def test_a_bar_follows_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bars("step") as bars:
        bars("denoise", 1, 4)
        assert bars.bar is not None and (bars.bar.n, bars.bar.total) == (1, 4)
        bars("denoise", 4, 4)
        assert bars.bar.n == 4
        bars("decode", 1, 2)
        assert (bars.bar.n, bars.bar.total, bars.bar.desc) == (1, 2, "decode")
    assert bars.bar is None


def test_outputs_are_checked_without_leaving_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    before = tree(tmp_path)
    check_scene_output(tmp_path / "a" / "b", overwrite=False)
    check_run_output(tmp_path / "a" / "b", "recipe.json")
    check_run_output(tmp_path / "run", "recipe.json")
    check_file_output(tmp_path / "a" / "b.json")
    for check in (
        lambda: check_scene_output(tmp_path / "foreign", overwrite=True),
        lambda: check_scene_output(tmp_path / "file" / "below", overwrite=False),
        lambda: check_run_output(tmp_path / "foreign", "recipe.json"),
        lambda: check_run_output(tmp_path / "file", "recipe.json"),
        lambda: check_file_output(tmp_path / "foreign"),
        lambda: check_file_output(tmp_path / "file" / "below.json"),
    ):
        with pytest.raises(UserError, match=str(tmp_path)):
            check()
    assert tree(tmp_path) == before


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "new" / "report.json", "first")
    assert (tmp_path / "new" / "report.json").read_text() == "first"

    def fail(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "new" / "report.json", "second")
    assert tree(tmp_path / "new") == {"report.json": b"first"}


@plain_summary
def test_the_checkpoints_recommendation_holds_unless_told_otherwise(
    u4d: Command, debug_checkpoint: Path, video: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(debug_checkpoint, checkpoint)
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps(index | {"dense_steps": 3, "dense_guidance": 1.5}))

    def settings(name: str, *options: object) -> tuple[int, float]:
        assert u4d("complete", video, "-o", tmp_path / name, "--checkpoint", checkpoint, *options).code == 0
        report = report_of(tmp_path / name)
        return report["steps"], report["guidance"]

    assert settings("recommended") == (3, 1.5)
    assert settings("asked", "--steps", 2, "--guidance", 0) == (2, 0)
    assert settings("sparse", "--observe", "rgb:0,-1") == (40, 2)
