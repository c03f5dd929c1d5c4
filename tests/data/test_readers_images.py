"""Images and folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from u4d.data.footage import even_indices
from u4d.data.images import natural_key
from u4d.errors import UserError
from u4d.scene import Scene


def write(path: Path, level: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    picture = np.full((*size, 3), level, np.uint8)
    picture[0, 0] = (255, 0, 10)
    Image.fromarray(picture).save(path)
    return picture


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    for number in (1, 10, 2, 9):
        write(tmp_path / f"frame{number}.png", 10 * number)
    write(tmp_path / ".frame3.png", 30)
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "Thumbs.PNG.d").mkdir()
    scene = Scene.load(tmp_path)
    assert (scene.rgb[:, 0, 5, 5] * 255).round().tolist() == [10, 20, 90, 100]
    assert (scene.rgb[0, :, 0, 0] * 255).round().tolist() == [255, 0, 10]
    assert (scene.num_frames, scene.image_size, scene.fps) == (4, (20, 30), 24.0)
    assert (scene.depth, scene.intrinsics, scene.cam_to_world) == (None, None, None)


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp", "tif"])
def test_a_single_image_of_any_kind(tmp_path: Path, suffix: str) -> None:
    picture = write(tmp_path / f"photo.{suffix}", 128)
    scene = Scene.load(tmp_path / f"photo.{suffix}")
    assert scene.num_frames == 1
    assert abs(float(scene.rgb[0, :, 10, 20].mean()) - picture[10, 20].mean() / 255) < 0.01


@pytest.mark.parametrize(("mode", "expected"), [("L", [77, 77, 77]), ("RGBA", [200, 10, 30]), ("P", [200, 10, 30])])
def test_other_colour_modes(tmp_path: Path, mode: str, expected: list[int]) -> None:
    colour: object = {"L": 77, "RGBA": (200, 10, 30, 128), "P": None}[mode]
    image = Image.new(mode, (8, 6), colour) if colour else Image.new("RGB", (8, 6), (200, 10, 30)).quantize(4)
    image.save(tmp_path / "a.png")
    assert (Scene.load(tmp_path / "a.png").rgb[0, :, 3, 3] * 255).round().tolist() == expected


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: the camera was held so that the picture must be turned clockwise."""
    picture = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "photo.png", exif=exif)
    scene = Scene.load(tmp_path / "photo.png")
    assert torch.equal(
        (scene.rgb[0] * 255).round().byte(), torch.from_numpy(np.rot90(picture, -1).copy()).permute(2, 0, 1)
    )


def test_max_frames_opens_no_other_file(tmp_path: Path) -> None:
    for number in range(9):
        write(tmp_path / f"{number:03d}.png", 20 * number)
    (tmp_path / "005.png").write_bytes(b"broken, but not asked for")
    scene = Scene.load(tmp_path, max_frames=3)
    assert (scene.rgb[:, 0, 5, 5] * 255).round().tolist() == [0, 80, 160]
    assert scene.fps == pytest.approx(24 * 2 / 8)
    assert scene.report["source"]["kept"] == [0, 4, 8]


def test_even_indices() -> None:
    for total in range(1, 40):
        for most in range(1, 45):
            kept = even_indices(total, most)
            assert len(kept) == min(total, most) and kept[0] == 0
            assert most == 1 or kept[-1] == total - 1
            steps = np.diff(kept)
            assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


def test_natural_key_sorts_as_people_do() -> None:
    names = ["b1", "a10", "a9", "A11", "a9b", "10", "9", "x-02", "x-1"]
    assert sorted(names, key=natural_key) == ["9", "10", "a9", "a9b", "a10", "A11", "b1", "x-1", "x-02"]


def test_another_size_in_the_middle(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.png", 50, (20, 30) if number != 3 else (24, 30))
    with pytest.raises(UserError, match=r"3\.png: expected 30x20 \(width x height\) like 0\.png, got 30x24"):
        Scene.load(tmp_path)


def test_damaged_image(tmp_path: Path) -> None:
    write(tmp_path / "0.png", 50)
    write(tmp_path / "1.png", 60)
    whole = (tmp_path / "1.png").read_bytes()
    for broken in (whole[: len(whole) // 2], b"no image", b""):
        (tmp_path / "1.png").write_bytes(broken)
        with pytest.raises(UserError, match=r"1\.png: expected a whole image, got one that can't be read"):
            Scene.load(tmp_path)


def test_depth_maps_are_not_taken_for_frames(tmp_path: Path) -> None:
    write(tmp_path / "0.color.png", 50)
    Image.fromarray(np.full((20, 30), 1500, np.uint16)).save(tmp_path / "0.depth.png")
    with pytest.raises(UserError, match=r"0\.depth\.png: expected an 8-bit colour image.*looks like a depth map"):
        Scene.load(tmp_path)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a folder with images \(.*\.png.*\), scene\.json or trans"):
        Scene.load(tmp_path)


def test_real_images_load(shared_data: Path) -> None:
    scene = Scene.load(shared_data / "agibot_sample" / "head_color")
    assert (scene.num_frames, scene.image_size) == (4, (480, 640))
