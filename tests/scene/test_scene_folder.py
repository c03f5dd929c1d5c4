"""Saved scenes: the same scene comes back, other programs can read it, and nothing is ever half written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from example_scenes import FLOOR_Y, WALL_Z, wall_and_floor
from u4d.data import scene_folder
from u4d.data.atomic import OutputExistsError, check_output_folder
from u4d.errors import UserError
from u4d.scene import Scene

PARTS = ("rgb", "depth", "intrinsics", "cam_to_world")


@pytest.fixture(autouse=True)
def undrawn_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; tests/view draws."""
    from u4d.view import summary

    monkeypatch.setattr(summary, "write_summary", lambda path, *_: Path(path).write_bytes(b"drawn elsewhere"))


@pytest.fixture
def scene() -> Scene:
    """Odd size, some invalid depth, a report with everything that JSON can't hold."""
    scene = wall_and_floor(frames=5, size=(23, 33))
    depth = scene.depth.clone()
    depth[1, :5, :7] = 0
    spread = torch.rand(5, 23, 33, generator=torch.Generator().manual_seed(0))
    report = {
        "errors": torch.tensor([0.5, 0.25]),
        "overlap": np.float32(0.125),
        "bad": float("nan"),
        "worse": [np.inf, 1],
        "path": Path("a/b"),
        3: (True, None),
        "inner": {"spread": spread},
    }
    return replace(scene, depth=depth, report=report)


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# --- round trips ---------------------------------------------------------------------------------------------------


def test_lossless_round_trip_is_exact(scene: Scene, tmp_path: Path) -> None:
    folder = scene.save(tmp_path / "out", lossless=True)
    loaded = Scene.load(folder)
    for part in PARTS[1:]:
        assert torch.equal(getattr(loaded, part), getattr(scene, part)), part
    assert torch.equal(loaded.rgb, (scene.rgb * 255).round() / 255)
    assert (loaded.caption, loaded.fps, loaded.scale) == (scene.caption, scene.fps, scene.scale)
    again = Scene.load(loaded.save(tmp_path / "again", lossless=True))
    assert all(torch.equal(getattr(again, part), getattr(loaded, part)) for part in PARTS)


def test_mp4_round_trip_is_close(scene: Scene, tmp_path: Path) -> None:
    smooth = replace(scene, rgb=torch.nn.functional.avg_pool2d(scene.rgb, 9, 1, 4))
    loaded = Scene.load(smooth.save(tmp_path / "out"))
    assert loaded.rgb.shape == scene.rgb.shape, "the row and column that pad an odd size are gone"
    assert float((loaded.rgb - smooth.rgb).abs().mean()) < 0.01
    assert torch.equal(loaded.depth, scene.depth)


@pytest.mark.parametrize("fps", [1e-5, 0.49, 24000 / 1001, 1e6])
def test_any_frame_rate_and_the_smallest_picture(tmp_path: Path, fps: float) -> None:
    tiny = wall_and_floor(frames=3, size=(1, 2), fps=fps)
    loaded = Scene.load(tiny.save(tmp_path / "out"))
    assert loaded.fps == fps and loaded.rgb.shape == (3, 3, 1, 2)


def test_report_comes_back_in_json_types(scene: Scene, tmp_path: Path) -> None:
    report = Scene.load(scene.save(tmp_path / "out")).report
    assert torch.equal(report["inner"].pop("spread"), scene.report["inner"]["spread"])
    assert report == {
        "errors": [0.5, 0.25],
        "overlap": 0.125,
        "bad": None,
        "worse": [None, 1],
        "path": "a/b",
        "3": [True, None],
        "inner": {},
    }
    text = (tmp_path / "out" / "scene.json").read_text()
    assert len(text) < 20_000, "arrays belong into report.npz"


@pytest.mark.parametrize("kept", [("rgb",), ("depth",), ("cam_to_world",), ("rgb", "cam_to_world"), ("rgb", "depth")])
def test_only_the_parts_that_exist(scene: Scene, tmp_path: Path, kept: tuple[str, ...]) -> None:
    some = Scene(**{part: getattr(scene, part) for part in kept}, fps=7.5)
    loaded = Scene.load(some.save(tmp_path / "out", lossless=True))
    assert [part for part in PARTS if getattr(loaded, part) is not None] == list(kept)
    assert loaded.fps == 7.5
    files = names(tmp_path / "out")
    assert ("depth.npz" in files) == ("depth.mp4" in files) == ("depth" in kept)
    assert ("trajectory.tum" in files) == ("cam_to_world" in kept)
    assert "points.ply" not in files and "report.npz" not in files


def test_files_of_a_full_scene(scene: Scene, tmp_path: Path) -> None:
    common = {"scene.json", "depth.npz", "depth.mp4", "trajectory.tum", "points.ply", "summary.png", "report.npz"}
    assert names(scene.save(tmp_path / "video")) == common | {"rgb.mp4"}
    assert names(scene.save(tmp_path / "png", lossless=True)) == common | {f"rgb/{n:06d}.png" for n in range(5)}
    document = json.loads((tmp_path / "video" / "scene.json").read_text())
    assert document["version"] == 1
    assert np.array_equal(np.float32(document["intrinsics"]), scene.intrinsics.numpy()), "every digit is there"


def test_max_frames_of_a_saved_scene(scene: Scene, tmp_path: Path) -> None:
    for lossless in (True, False):
        folder = scene.save(tmp_path / str(lossless), lossless=lossless)
        loaded = Scene.load(folder, max_frames=3)
        assert torch.equal(loaded.cam_to_world, scene.cam_to_world[[0, 2, 4]])
        assert torch.equal(loaded.depth, scene.depth[[0, 2, 4]])
        assert float((loaded.rgb - Scene.load(folder).rgb[[0, 2, 4]]).abs().max()) == 0
        assert loaded.fps == scene.fps / 2


def test_cameras_replace_those_of_a_saved_scene(scene: Scene, tmp_path: Path) -> None:
    folder = scene.save(tmp_path / "out")
    (tmp_path / "still.txt").write_text("\n".join(f"{n} 0 0 {n} 0 0 0 1" for n in range(5)))
    loaded = Scene.load(folder, cameras=tmp_path / "still.txt")
    assert loaded.cam_to_world[:, 2, 3].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(loaded.intrinsics, scene.intrinsics), "TUM knows none, so the scene's stay"


def test_a_scene_with_gradients_saves(scene: Scene, tmp_path: Path) -> None:
    learnt = replace(scene, depth=scene.depth.clone().requires_grad_(), rgb=scene.rgb.clone().requires_grad_())
    assert torch.equal(Scene.load(learnt.save(tmp_path / "out")).depth, scene.depth)


def test_evo_reads_the_trajectory(scene: Scene, tmp_path: Path) -> None:
    from evo.tools import file_interface

    folder = scene.save(tmp_path / "out")
    poses = np.stack(file_interface.read_tum_trajectory_file(str(folder / "trajectory.tum")).poses_se3)
    np.testing.assert_allclose(poses, scene.cam_to_world.numpy(), atol=1e-6)


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A reader of its own: header by words, then 15 bytes per vertex."""
    head, body = path.read_bytes().split(b"end_header\n", 1)
    words = [line.split() for line in head.decode().splitlines()]
    assert words[0] == ["ply"] and words[1] == ["format", "binary_little_endian", "1.0"]
    count = int(next(line[2] for line in words if line[:2] == ["element", "vertex"]))
    properties = [line[1:] for line in words if line[0] == "property"]
    floats, bytes_ = [["float", axis] for axis in "xyz"], [["uchar", c] for c in ("red", "green", "blue")]
    assert properties == floats + bytes_ and len(body) == 15 * count
    rows = [struct.unpack_from("<3f3B", body, 15 * i) for i in range(count)]
    return np.array([row[:3] for row in rows]), np.array([row[3:] for row in rows])


def test_points_lie_on_the_surfaces_in_their_colours(scene: Scene, tmp_path: Path) -> None:
    points, colours = read_ply(scene.save(tmp_path / "out") / "points.ply")
    assert 0.5 * scene.depth.numel() < len(points) <= scene.depth.numel()
    assert np.minimum(np.abs(points[:, 2] - WALL_Z), np.abs(points[:, 1] - FLOOR_Y)).max() < 1e-4
    for axis, place in ((2, WALL_Z), (1, FLOOR_Y)):
        along = [i for i in range(3) if i != axis]
        clear = np.abs(2 * points[:, along] - np.round(2 * points[:, along])).min(1) > 0.02  # of lines between checks
        surface = clear & (np.abs(points[:, axis] - place) < 1e-4)
        checks = (np.floor(2 * points[surface][:, along]).sum(1) + np.floor(2 * place)) % 2
        orange = colours[surface][:, 0] - colours[surface][:, 2].astype(int) > 60
        assert surface.sum() > 100 and np.array_equal(checks == 1, orange)


# --- damaged scenes --------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "scene.json").read_text())
    (folder / "scene.json").write_text(json.dumps({**document, **changes}))


def rewrite_depth(folder: Path, depth: np.ndarray) -> None:
    np.savez_compressed(folder / "depth.npz", depth=depth)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not json": (lambda f: (f / "scene.json").write_text("{"), r"scene\.json: expected a saved scene's json"),
    "a list": (
        lambda f: (f / "scene.json").write_text("[]"),
        r"scene\.json: expected a saved scene \(format 'u4d-scene'",
    ),
    "no format": (lambda f: edit(f, format="other"), r"scene\.json: expected a saved scene"),
    "newer": (lambda f: edit(f, version=2), r"scene\.json: expected version 1, got 2; update u4d"),
    "frames": (lambda f: edit(f, num_frames="five"), r'num_frames: expected a whole number from 1, got "five"'),
    "fewer frames": (lambda f: edit(f, num_frames=4), r"rgb\.mp4: expected 4 frames as scene\.json says, got 5"),
    "size": (lambda f: edit(f, image_size=[24, -3]), r"image_size: expected \[height, width\] or null"),
    "other size": (lambda f: edit(f, image_size=[50, 33]), r"rgb\.mp4: expected 33x50 .* says, got 34x24"),
    "fps": (lambda f: edit(f, fps=0), r"scene\.json: fps: expected a positive number"),
    "caption": (lambda f: edit(f, caption=3), r"scene\.json: caption: expected text, got 3"),
    "escape": (lambda f: edit(f, rgb="../../x.mp4"), r"scene\.json: rgb: expected rgb\.mp4, rgb/%06d\.png or null"),
    "escape depth": (lambda f: edit(f, depth="/etc/passwd"), r"scene\.json: depth: expected depth\.npz or null"),
    "matrix": (lambda f: edit(f, intrinsics=[[1, 2], [3]]), "intrinsics: expected a list of matrices of numbers"),
    "matrix words": (lambda f: edit(f, cam_to_world=["a"] * 5), "cam_to_world: expected a list of matrices"),
    "matrix count": (
        lambda f: edit(f, cam_to_world=torch.eye(4).repeat(4, 1, 1).tolist()),
        "expected 5 matrices, got 4",
    ),
    "no matrices": (lambda f: edit(f, cam_to_world=[]), "cam_to_world: expected 5 matrices, got 0"),
    "matrix shape": (lambda f: edit(f, cam_to_world=torch.eye(3).repeat(5, 1, 1).tolist()), r"got \[5,3,3\]"),
    "not rigid": (lambda f: edit(f, cam_to_world=(2 * torch.eye(4)).repeat(5, 1, 1).tolist()), "rotation .* frame 0"),
    "nan": (lambda f: edit(f, intrinsics=[[[float("nan")] * 3] * 3] * 5), r"scene\.json: intrinsics: .* frame 0"),
    "no field": (lambda f: edit(f, report=None), r"scene\.json: report: expected an object, got null"),
    "no rgb": (lambda f: (f / "rgb.mp4").unlink(), r"rgb\.mp4: the saved scene's pictures are missing"),
    "cut rgb": (lambda f: os.truncate(f / "rgb.mp4", 700), r"rgb\.mp4: "),
    "no depth": (lambda f: (f / "depth.npz").unlink(), r"depth\.npz: .* but it is missing"),
    "cut depth": (lambda f: os.truncate(f / "depth.npz", 300), r"depth\.npz: expected arrays .* can't be read"),
    "empty depth": (lambda f: (f / "depth.npz").write_bytes(b""), r"depth\.npz: expected arrays .* can't be read"),
    "depth shape": (
        lambda f: rewrite_depth(f, np.ones((5, 23, 32), np.float32)),
        r"depth\.npz: expected depth float32 \[5, 23, 33\] as scene\.json says, got float32 \[5, 23, 32\]",
    ),
    "depth kind": (lambda f: rewrite_depth(f, np.ones((5, 23, 33))), r"depth\.npz: expected depth float32 .*float64"),
    "depth name": (lambda f: np.savez(f / "depth.npz", other=np.ones(3)), r"depth\.npz: expected arrays \['depth'\]"),
    "depth zeros": (lambda f: rewrite_depth(f, np.zeros((5, 23, 33), np.float32)), "depth: expected pixels with"),
    "pickle": (lambda f: rewrite_depth(f, np.array([{"code": 1}], dtype=object)), r"depth\.npz: .*allow_pickle=False"),
    "no report": (lambda f: (f / "report.npz").unlink(), r"report\.npz: .* but it is missing"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = wall_and_floor(frames=5, size=(23, 33))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("u4d.view.summary.write_summary", lambda *_: None)
        return replace(whole, report={"spread": whole.depth}).save(tmp_path_factory.mktemp("saved") / "scene")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scenes_are_refused(saved: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    folder = Path(shutil.copytree(saved, tmp_path / "scene"))
    Scene.load(folder)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        Scene.load(folder)


def test_lossless_frames_missing_or_of_another_size(scene: Scene, tmp_path: Path) -> None:
    from PIL import Image

    folder = scene.save(tmp_path / "out", lossless=True)
    Image.new("RGB", (40, 40)).save(folder / "rgb" / "000002.png")
    with pytest.raises(UserError, match=r"000002\.png: expected 33x23"):
        Scene.load(folder)
    (folder / "rgb" / "000002.png").unlink()
    with pytest.raises(UserError, match=r"rgb: expected 5 frames as scene\.json says, got 4"):
        Scene.load(folder)


def test_the_json_file_is_not_the_scene(saved: Path) -> None:
    with pytest.raises(UserError, match=r"give .*scene$"):
        Scene.load(saved / "scene.json")


# --- atomicity -----------------------------------------------------------------------------------------------------


def test_existing_results_are_kept_unless_asked(scene: Scene, tmp_path: Path) -> None:
    folder = scene.save(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(
        OutputExistsError, match=r"out: holds an older result; .*overwrite=True \(--overwrite"
    ) as raised:
        replace(scene, caption="new").save(folder)
    assert isinstance(raised.value, UserError) and isinstance(raised.value, FileExistsError)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    replace(scene, caption="new", depth=None).save(folder, overwrite=True)
    assert Scene.load(folder).caption == "new"
    assert "depth.npz" not in names(folder), "the older result is replaced as a whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_foreign_folders_and_files_are_never_replaced(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("dear to somebody")
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"photos: expected a new or empty folder.*holds other files"):
            scene.save(tmp_path / "photos", overwrite=overwrite)
        with pytest.raises(UserError, match=r"file: expected a folder to write to, got a file"):
            scene.save(tmp_path / "file", overwrite=overwrite)
    assert names(tmp_path) == {"photos/a.jpg", "file"}


def test_empty_folders_links_and_missing_parents_are_fine(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert Scene.load(scene.save(tmp_path / "empty")).num_frames == 5
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    scene.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "scene.json").is_file()
    assert Scene.load(scene.save(tmp_path / "a" / "b" / "out")).num_frames == 5


@pytest.mark.parametrize("failing", ["_write_rgb", "_write_depth", "_write_points", "_write_document", "write_path"])
@pytest.mark.parametrize("failure", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_older_result(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, failure: BaseException
) -> None:
    folder = scene.save(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(scene_folder, failing, fail)
    with pytest.raises(type(failure)):
        replace(scene, caption="new").save(folder, overwrite=True)
    with pytest.raises(type(failure)):
        scene.save(tmp_path / "deep" / "down" / "fresh")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no temporary folder and no new parents are left"


def test_a_swap_that_fails_puts_the_older_result_back(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scene.save(tmp_path / "out")
    rename = Path.rename

    def fail_on_arrival(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("no more")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_arrival)
    with pytest.raises(OSError, match="no more"):
        replace(scene, caption="new").save(folder, overwrite=True)
    monkeypatch.undo()
    assert json.loads((folder / "scene.json").read_text())["caption"] == scene.caption
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_somebody_else_writes_meanwhile(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def intrude(*_: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")

    monkeypatch.setattr(scene_folder, "_write_points", intrude)
    with pytest.raises(UserError, match="holds other files"):
        scene.save(tmp_path / "out")
    assert names(tmp_path) == {"out/theirs"}


def test_unwritable_places(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "out", Path("/proc/u4d/out")):
        with pytest.raises(UserError, match="expected a place that can be written to, got: "):
            scene.save(place)

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"written to, got: permission denied; choose another output$"):
        scene.save(tmp_path / "out")


def test_outputs_can_be_checked_before_long_work(scene: Scene, tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new", scene_folder.MARKER, overwrite=False)
    scene.save(tmp_path / "out")
    with pytest.raises(OutputExistsError):
        check_output_folder(tmp_path / "out", scene_folder.MARKER, overwrite=False)
    check_output_folder(tmp_path / "out", scene_folder.MARKER, overwrite=True)


def test_permissions_follow_the_umask(scene: Scene, tmp_path: Path) -> None:
    folder = scene.save(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read what they may read elsewhere"
