"""`u4d complete --window`: every frame of a long input, in one world frame and one unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import SIZE, Command

from u4d.commands.completion import MOST_WINDOWS, format_windows
from u4d.data.video import write_video
from u4d.scene import Scene

pytestmark = pytest.mark.usefixtures("plain_summary")
WINDOWS = [[0, 5], [4, 9], [8, 13]]


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 frames, larger than what the checkpoint takes, each of its own shade."""
    path = tmp_path_factory.mktemp("videos") / "long.mp4"
    shades = torch.linspace(0, 255, 14).to(torch.uint8)
    write_video(path, (shade.expand(64, 96, 3).numpy() for shade in shades), fps=20)
    return path


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scene.json").read_text())["report"]


def test_every_frame_is_completed(complete: Command, long_video: Path, tmp_path: Path) -> None:
    done = complete(long_video, "-o", tmp_path / "out", "--window", 6)
    assert (done.code, done.err) == (0, "")
    assert "14 frames, 6 at a time" in done.out
    scene, report = Scene.load(tmp_path / "out"), report_of(tmp_path / "out")
    assert scene.num_frames == 14 and scene.image_size == SIZE and scene.fps == 20
    assert all(bool(torch.isfinite(part).all()) for part in (scene.depth, scene.intrinsics, scene.cam_to_world))
    shades = scene.rgb.mean((1, 2, 3))
    assert torch.allclose(shades, torch.linspace(0, 1, 14), atol=0.03)
    assert report["source"]["kept"] == report["frames"] == list(range(14)) and not report["notes"]
    assert [window["frames"] for window in report["windows"]] == WINDOWS
    lines = done.out[done.out.index("window  ") :].splitlines()[2:5]
    assert [line.split()[:4] for line in lines] == [[str(k), str(a), "to", str(b)] for k, (a, b) in enumerate(WINDOWS)]


def test_more_overlap_and_fewer_frames(complete: Command, long_video: Path, tmp_path: Path) -> None:
    done = complete(long_video, "-o", tmp_path / "out", "--window", 6, "--overlap", 4, "--frames", 10)
    assert done.code == 0 and "14 frames, of which 10 are taken, 6 at a time" in done.out
    report = report_of(tmp_path / "out")
    assert [window["frames"] for window in report["windows"]] == [[0, 5], [2, 7], [4, 9]]
    assert len(report["source"]["kept"]) == 10 and report["source"]["kept"][-1] == 13


def test_an_input_that_fits_one_window_gives_what_it_gives_without(
    complete: Command, video: Path, tmp_path: Path
) -> None:
    assert complete(video, "-o", tmp_path / "plain", "--frames", 6).code == 0
    assert complete(video, "-o", tmp_path / "window", "--frames", 6, "--window", 6).code == 0
    plain, window = (Scene.load(tmp_path / name) for name in ("plain", "window"))
    torch.testing.assert_close(plain.depth, window.depth, rtol=1e-3, atol=1e-4)
    assert "windows" not in window.report


def test_long_results_come_at_the_inputs_size_on_request(complete: Command, long_video: Path, tmp_path: Path) -> None:
    assert complete(long_video, "-o", tmp_path / "out", "--window", 6, "--original-size").code == 0
    scene = Scene.load(tmp_path / "out")
    assert scene.num_frames == 14 and scene.image_size == (64, 96)


def test_a_camera_path_sets_frame_and_unit_of_all_windows(complete: Command, long_video: Path, tmp_path: Path) -> None:
    """Intrinsics are those of the file's own size: pictures are resized while they are read."""
    poses = torch.eye(4).repeat(14, 1, 1)
    poses[:, 0, 3] = torch.linspace(2, 3.3, 14)
    entries = [{"file_path": f"{i:06d}.png", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)]
    cameras = tmp_path / "cameras.json"
    cameras.write_text(json.dumps({"fl_x": 80, "fl_y": 80, "cx": 48, "cy": 32, "frames": entries}))
    done = complete(long_video, "-o", tmp_path / "out", "--window", 6, "--cameras", cameras)
    assert done.code == 0 and "metric: in the unit of the observed" in done.out
    scene = Scene.load(tmp_path / "out")
    torch.testing.assert_close(scene.cam_to_world[:, :3, 3], poses[:, :3, 3])
    torch.testing.assert_close(scene.intrinsics[3], torch.tensor([[40.0, 0, 24], [0, 40, 16], [0, 0, 1]]))
    assert report_of(tmp_path / "out")["metric"] is True
    late = complete(
        *(long_video, "-o", tmp_path / "late", "--window", 6, "--cameras", cameras),
        *("--observe", "rgb:all,camera:9:14"),
    )
    assert late.code == 2 and "first window" in late.err and not (tmp_path / "late").exists()


def test_a_long_scene_is_compared_with_what_it_knows(complete: Command, tmp_path: Path) -> None:
    from u4d.data import ProceduralScenes

    known = ProceduralScenes("val", frames=10, size=SIZE)[0]
    known.save(tmp_path / "known", lossless=True)
    done = complete(tmp_path / "known", "-o", tmp_path / "out", "--window", 6, "--observe", "rgb:all,depth:0")
    assert done.code == 0 and "depth against the truth" in done.out and "camera against the truth" in done.out
    assert torch.equal(Scene.load(tmp_path / "out").depth[0], known.depth[0])


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (("--window", 7), "window: expected 2 to 6 frames for this checkpoint, got 7"),
        (("--window", 6, "--overlap", 6), "overlap: expected 1 to 5"),
        (("--overlap", 2), "--overlap: expected it together with --window"),
        (("--window", 6, "--frames", 20), "--frames: expected at most the input's 14 with --window"),
        (("--window", 0), "--window"),
    ],
)
def test_mistakes_are_told_before_any_work(
    complete: Command, long_video: Path, tmp_path: Path, options: tuple[object, ...], needle: str
) -> None:
    done = complete(long_video, "-o", tmp_path / "out", *options)
    assert done.code == 2 and needle in done.err
    assert not (tmp_path / "out").exists()


def test_the_table_of_very_many_windows_is_cut() -> None:
    entry = {
        "best": 1,
        "drawn": 2,
        "errors": [0.2, 0.1],
        "consistency": {"reprojection_error": 0.1, "overlap": 0.5},
        "timings_s": {"denoise": 1.0},
        "offset": {"scale": 0.8, "rotation_deg": 1.5, "translation": 0.1},
    }
    windows = [{**entry, "frames": [8 * k, 8 * k + 17]} for k in range(30)]
    table = format_windows(Scene(rgb=torch.zeros(1, 3, 8, 8), report={"windows": windows}))
    assert len(table.splitlines()) == 2 + MOST_WINDOWS + 1 and "18 windows between these are in scene.json" in table
    assert "232 to 249" in table and "+25.0%" in table and "1.50 deg" in table and "1 of 2" in table
