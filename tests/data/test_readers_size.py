"""Reading at another size: as if resized afterwards, without holding the clip at its full size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from u4d.data import images, video
from u4d.data.images import write_png
from u4d.data.video import write_video
from u4d.errors import UserError
from u4d.scene import Scene

STORED, WANTED, FRAMES = (48, 80), (32, 48), 5


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*STORED, 3), dtype=np.uint8) for _ in range(FRAMES)]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, pictures(), fps=10)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "frames"
    path.mkdir()
    for i, picture in enumerate(pictures()):
        write_png(path / f"{i:03d}.png", picture)
    return path


def document(**more: Any) -> dict[str, Any]:
    """A transforms.json without w and h: its intrinsics are in pixels of the pictures that are there."""
    poses = torch.eye(4).repeat(FRAMES, 1, 1)
    poses[:, 0, 3] = torch.arange(FRAMES)
    entries = [{"file_path": f"{i:03d}.png", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)]
    return {"fl_x": 70.0, "fl_y": 60.0, "cx": 39.0, "cy": 25.0, "frames": entries, **more}


def assert_same(one: Scene, other: Scene) -> None:
    for name in ("rgb", "depth", "intrinsics", "cam_to_world"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert one.fps == other.fps and one.report == other.report


@pytest.mark.parametrize("most", [None, 3])
@pytest.mark.parametrize("size", [WANTED, STORED, (96, 100)])
def test_as_if_resized_afterwards(clip: Path, folder: Path, most: int | None, size: tuple[int, int]) -> None:
    for path in (clip, folder, folder / "002.png"):
        small = Scene.load(path, max_frames=most, image_size=size)
        assert small.image_size == size
        assert_same(small, Scene.load(path, max_frames=most).resized(size))


@pytest.mark.parametrize("more", [{}, {"w": 160, "h": 96}])
def test_cameras_follow(clip: Path, folder: Path, tmp_path: Path, more: dict[str, int]) -> None:
    cameras = tmp_path / "cameras.json"
    cameras.write_text(json.dumps(document(**more)))
    for path in (clip, folder):
        small = Scene.load(path, cameras=cameras, image_size=WANTED)
        assert_same(small, Scene.load(path, cameras=cameras).resized(WANTED))
        assert float(small.intrinsics[0, 0, 0]) == pytest.approx(70 * 48 / more.get("w", 80))
    (folder / "transforms.json").write_text(json.dumps(document(**more)))
    assert_same(Scene.load(folder, image_size=WANTED), Scene.load(folder).resized(WANTED))


def test_saved_scenes(tmp_path: Path) -> None:
    rgb = torch.from_numpy(np.stack(pictures())).permute(0, 3, 1, 2) / 255
    poses = torch.eye(4).repeat(FRAMES, 1, 1)
    lens = torch.tensor([[70.0, 0, 39], [0, 60, 25], [0, 0, 1]]).repeat(FRAMES, 1, 1)
    scene = Scene(rgb=rgb, depth=1 + rgb[:, 0], intrinsics=lens, cam_to_world=poses)
    scene.save(tmp_path / "known", lossless=True)
    assert_same(Scene.load(tmp_path / "known", image_size=WANTED), Scene.load(tmp_path / "known").resized(WANTED))
    replace(scene, rgb=None, depth=None).save(tmp_path / "cameras")
    alone = Scene.load(tmp_path / "cameras", image_size=WANTED)
    torch.testing.assert_close(alone.intrinsics, lens)


def test_only_small_pictures_are_held(clip: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    stack = video.stack_frames

    def watch(frames: list[np.ndarray]) -> torch.Tensor:
        held.append({frame.shape for frame in frames})
        return stack(frames)

    monkeypatch.setattr(video, "stack_frames", watch)
    monkeypatch.setattr(images, "stack_frames", watch)
    for path in (clip, folder):
        Scene.load(path, image_size=WANTED)
    assert held == [{(*WANTED, 3)}] * 2


def test_a_picture_of_another_size_is_still_refused(folder: Path) -> None:
    write_png(folder / "003.png", np.zeros((*WANTED, 3), np.uint8))
    with pytest.raises(UserError, match=r"003.png: expected 80x48 .* got 48x32"):
        Scene.load(folder, image_size=WANTED)


@pytest.mark.parametrize("size", [(0, 32), (32,), (32.5, 48)])
def test_nonsense_is_told(clip: Path, size: Any) -> None:
    with pytest.raises(UserError, match="image_size: expected"):
        Scene.load(clip, image_size=size)
