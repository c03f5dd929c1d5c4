"""Camera files: nerfstudio, RealEstate10K, TUM. Each is checked by formulas written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from example_scenes import wall_and_floor
from u4d.data.camera_path import read_camera_path
from u4d.data.tum import write_path
from u4d.errors import UserError
from u4d.scene import Scene

SIZE = (24, 32)


def write_images(folder: Path, count: int, size: tuple[int, int] = SIZE, name: str = "{:05d}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.fromarray(np.full((*size, 3), 10 * n, np.uint8)).save(folder / name.format(n))
    return folder


def spin(n: int) -> np.ndarray:
    """World-to-camera [3,4] of a camera that turns by 10 degrees and sinks by 0.1 per frame."""
    angle = math.radians(10 * n)
    rotation = np.array([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
    return np.concatenate([rotation, [[0.3 * n], [0.1 * n], [-0.2]]], 1)


def write_re10k(path: Path, count: int, step_us: int = 33000) -> Path:
    lines = ["https://www.youtube.com/watch?v=example"]
    for n in range(count):
        numbers = [n * step_us + 1000000, 0.6, 0.9, 0.5, 0.49, 0, 0, *spin(n).ravel()]
        lines.append(" ".join(str(number) for number in numbers))
    path.write_text("\n".join(lines) + "\n")
    return path


# --- RealEstate10K -----------------------------------------------------------------------------------------------


def test_re10k_projects_like_its_own_formula(tmp_path: Path) -> None:
    """A world point lands where `K [R|t] X` of the file puts it, in pixels of this image."""
    clip = write_images(tmp_path / "clip", 4)
    scene = Scene.load(clip, cameras=write_re10k(tmp_path / "path.txt", 4))
    point = np.array([0.2, -0.3, 4.0, 1.0])
    for n in range(4):
        x, y, z = spin(n) @ point
        expected = (32 * (0.6 * x / z + 0.5), 24 * (0.9 * y / z + 0.49))
        seen = torch.linalg.inv(scene.cam_to_world[n].double()) @ torch.from_numpy(point)
        u, v, w = (scene.intrinsics[n].double() @ seen[:3]).tolist()
        assert (u / w, v / w) == pytest.approx(expected, abs=1e-4)


def test_re10k_real_file_by_hand(shared_data: Path) -> None:
    """First camera of a real file: focal lengths times 384 and 256, centre -R^T t from its printed digits."""
    name = "0bf152ef84195293"
    folder = shared_data / "re10k"
    scene = Scene.load(folder / "videos" / f"{name}.mp4", cameras=folder / "pose_files" / f"{name}.txt")
    assert (scene.num_frames, scene.image_size) == (16, (256, 384))
    expected_k = [[0.474812461 * 384, 0, 192], [0, 0.844111024 * 256, 128], [0, 0, 1]]
    np.testing.assert_allclose(scene.intrinsics[0], expected_k, rtol=1e-6)
    columns = [(0.780003667, -0.062449891, 0.622651041), (0.059620168, 0.997897983, 0.025398925)]
    columns.append((-0.622928321, 0.017311305, 0.782087326))
    translation = (0.726968666, 0.217967188, -1.002211444)
    centre = [-sum(a * b for a, b in zip(column, translation, strict=True)) for column in columns]
    np.testing.assert_allclose(scene.cam_to_world[0, :3, 3], centre, atol=1e-6)


def test_re10k_epipolar_geometry_of_a_real_clip(shared_data: Path) -> None:
    """Matched corners lie on the epipolar lines of the cameras as read, and not on those of their inverses."""
    from skimage.feature import ORB, match_descriptors

    folder = shared_data / "re10k"
    name = "2c80f9eb0d3b2bb4"
    scene = Scene.load(folder / "videos" / f"{name}.mp4", cameras=folder / "pose_files" / f"{name}.txt")
    found = []
    for n in (0, 4):
        detector = ORB(n_keypoints=400)
        detector.detect_and_extract(scene.rgb[n].mean(0).double().numpy())
        found.append((detector.keypoints[:, ::-1] + 0.5, detector.descriptors))
    pairs = match_descriptors(found[0][1], found[1][1], cross_check=True, max_ratio=0.8)
    assert len(pairs) > 40
    first, second = found[0][0][pairs[:, 0]], found[1][0][pairs[:, 1]]

    def median_error(poses: torch.Tensor) -> float:
        relative = np.linalg.inv(poses[4].double().numpy()) @ poses[0].double().numpy()
        tx, ty, tz = relative[:3, 3]
        essential = np.array([[0, -tz, ty], [tz, 0, -tx], [-ty, tx, 0]]) @ relative[:3, :3]
        inverse_k = np.linalg.inv(scene.intrinsics[0].double().numpy())
        fundamental = inverse_k.T @ essential @ inverse_k
        lines = np.c_[first, np.ones(len(first))] @ fundamental.T
        distance = np.abs((lines * np.c_[second, np.ones(len(second))]).sum(1)) / np.hypot(lines[:, 0], lines[:, 1])
        return float(np.median(distance))

    assert median_error(scene.cam_to_world) < 1.5
    assert median_error(torch.linalg.inv(scene.cam_to_world)) > 3


# --- TUM -----------------------------------------------------------------------------------------------------------


def test_tum_quaternions_turn_as_they_should(tmp_path: Path) -> None:
    half = math.sqrt(0.5)
    rows = ["# comment", "0.0 1 2 3 0 0 0 1", f"0.1,4,5,6,0,{half},0,{half}", f"0.2 0 0 0 {half} 0 0 -{half}"]
    (tmp_path / "path.txt").write_text("\n".join(rows))
    scene = Scene.load(write_images(tmp_path / "clip", 3), cameras=tmp_path / "path.txt")
    assert scene.intrinsics is None
    assert scene.cam_to_world[:, :3, 3].tolist() == [[1, 2, 3], [4, 5, 6], [0, 0, 0]]
    # A quarter turn about y takes z to x; a quarter turn about -x takes z to y.
    torch.testing.assert_close(scene.cam_to_world[1, :3, 2], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(scene.cam_to_world[2, :3, 2], torch.tensor([0.0, 1, 0]))


def test_tum_written_is_read_back_and_evo_agrees(tmp_path: Path) -> None:
    from evo.tools import file_interface

    truth = wall_and_floor(frames=9).cam_to_world
    write_path(tmp_path / "trajectory.tum", truth, fps=12.0)
    read = read_camera_path(tmp_path / "trajectory.tum", SIZE)
    torch.testing.assert_close(read.cam_to_world.float(), truth, atol=1e-6, rtol=0)
    trajectory = file_interface.read_tum_trajectory_file(str(tmp_path / "trajectory.tum"))
    np.testing.assert_allclose(np.stack(trajectory.poses_se3), truth.numpy(), atol=1e-6)
    np.testing.assert_allclose(trajectory.timestamps, np.arange(9) / 12.0, atol=1e-8)


def test_tum_real_file_agrees_with_evo(shared_data: Path) -> None:
    from evo.tools import file_interface

    path = shared_data / "trajectories" / "freiburg1_xyz-rgbdslam.txt"
    read = read_camera_path(path, SIZE)
    expected = np.stack(file_interface.read_tum_trajectory_file(str(path)).poses_se3)
    np.testing.assert_allclose(read.cam_to_world, expected, atol=1e-9)


def test_time_stamps_in_image_names_find_their_poses(tmp_path: Path) -> None:
    """As in the TUM data set: 30 images a second named by time, poses at 100 a second that start earlier."""
    clip = tmp_path / "rgb"
    clip.mkdir()
    for n in range(10):
        Image.new("RGB", (8, 8)).save(clip / f"{100 + n / 30:.6f}.png")
    times = np.arange(98.0, 102.0, 0.01)
    (tmp_path / "gt.txt").write_text("\n".join(f"{t:.4f} {t:.6f} 0 0 0 0 0 1" for t in times))
    for most, kept in ((None, range(10)), (4, (0, 3, 6, 9))):
        scene = Scene.load(clip, cameras=tmp_path / "gt.txt", max_frames=most)
        expected = np.array([100 + n / 30 for n in kept])
        np.testing.assert_allclose(scene.cam_to_world[:, 0, 3], expected, atol=0.0051)


def test_microsecond_names_find_their_re10k_poses(tmp_path: Path) -> None:
    path = write_re10k(tmp_path / "path.txt", 8)
    clip = tmp_path / "frames"
    clip.mkdir()
    for n in (1, 2, 5):
        Image.new("RGB", (8, 8)).save(clip / f"{n * 33000 + 1000000}.png")
    scene = Scene.load(clip, cameras=path)
    expected = np.stack([np.linalg.inv(np.vstack([spin(n), [0, 0, 0, 1]])) for n in (1, 2, 5)])
    np.testing.assert_allclose(scene.cam_to_world, expected, atol=1e-6)


def test_video_time_finds_re10k_microseconds(tmp_path: Path) -> None:
    from u4d.data.video import write_video

    write_video(tmp_path / "clip.mp4", [np.zeros((16, 16, 3), np.uint8)] * 10, fps=10)
    lines = [f"{t} 0.5 0.5 0.5 0.5 0 0 1 0 0 {-t} 0 1 0 0 0 0 1 0" for t in range(0, 1000001, 50000)]
    (tmp_path / "path.txt").write_text("\n".join(lines))
    scene = Scene.load(tmp_path / "clip.mp4", cameras=tmp_path / "path.txt", max_frames=4)
    np.testing.assert_allclose(scene.cam_to_world[:, 0, 3], [0, 3e5, 6e5, 9e5])


def test_a_path_of_another_length_is_refused(tmp_path: Path) -> None:
    clip = write_images(tmp_path / "clip", 5, name="photo{}.png")
    path = write_re10k(tmp_path / "path.txt", 4)
    message = (
        r"path\.txt: expected one pose for each of the 5 frames of .*clip, got 4 poses; and there are no time stamps"
    )
    with pytest.raises(UserError, match=message):
        Scene.load(clip, cameras=path)


def test_clocks_that_do_not_meet_are_refused(tmp_path: Path) -> None:
    from u4d.data.video import write_video

    write_video(tmp_path / "clip.mp4", [np.zeros((16, 16, 3), np.uint8)] * 5, fps=10)
    (tmp_path / "gt.txt").write_text("\n".join(f"{1305031098 + 0.01 * n:.2f} 0 0 0 0 0 0 1" for n in range(40)))
    with pytest.raises(UserError, match=r"5 of 5 frames find no pose within half a frame \(0\.05\), first frame 0"):
        Scene.load(tmp_path / "clip.mp4", cameras=tmp_path / "gt.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got no data"),
        ("1 2 3\n", "expected a camera path with 19 columns .* got 3"),
        ("0 0 0 0 0 0 0 1\n1 0 0 zero 0 0 0 1\n", "line 2: expected 8 numbers, got .*zero"),
        ("0 0 0 0 0 0 0 1\n\n1 0 0 0 0 0 1\n", "line 3: expected 8 columns, got 7"),
        ("0 0 0 0 1 0 0 1\n", r"line 1: expected a unit quaternion qx qy qz qw, got length 1\.41421"),
        ("0 0 0 0 nan 0 0 1\n", "line 1: expected a unit quaternion"),
        ("0 0 0 0 0 0 0 1\n1 nan 0 0 0 0 0 1\n", "expected finite numbers, got NaN or infinity in frame 1"),
        ("0 .5 .5 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 2 0\n", r"world_to_cam: expected a rotation .* in frame 0"),
        ("0 0 .5 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n", r"intrinsics: expected positive focal lengths .* in frame 0"),
        ("\x00\xff\xfe", "columns"),
    ],
)
def test_bad_camera_text(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "path.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"path\.txt.*{message}"):
        Scene.load(write_images(tmp_path / "clip", 2), cameras=path)


def test_binary_and_missing_camera_files(tmp_path: Path) -> None:
    clip = write_images(tmp_path / "clip", 2)
    (tmp_path / "path.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="expected a text file"):
        Scene.load(clip, cameras=tmp_path / "path.txt")
    with pytest.raises(UserError, match=r"none\.txt: .*expected a camera path"):
        Scene.load(clip, cameras=tmp_path / "none.txt")


# --- nerfstudio ----------------------------------------------------------------------------------------------------


def opengl_pose(n: int) -> list[list[float]]:
    """A camera at (n, 0, 0) that looks along the world's -z with y up: OpenGL's identity rotation."""
    return [[1, 0, 0, n], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def transforms(count: int, **more: Any) -> dict[str, Any]:
    frames = [{"file_path": f"images/{n:05d}.png", "transform_matrix": opengl_pose(n)} for n in range(count)]
    return {"fl_x": 40.0, "fl_y": 44.0, "cx": 33.0, "cy": 23.0, "w": 64, "h": 48, "frames": frames, **more}


def write_transforms(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "transforms.json"
    path.write_text(json.dumps(document))
    return path


def test_nerfstudio_axes_and_rescaled_intrinsics(tmp_path: Path) -> None:
    """What OpenGL calls -z is in front, +y is up; the images here are half the size that the file speaks of."""
    write_images(tmp_path / "images", 3)
    write_transforms(tmp_path, transforms(3))
    for source in (tmp_path, tmp_path / "transforms.json"):
        scene = Scene.load(source)
        assert scene.cam_to_world[:, :3, 3].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
        assert scene.cam_to_world[0, :3, 2].tolist() == [0, 0, -1], "forward"
        assert scene.cam_to_world[0, :3, 1].tolist() == [0, -1, 0], "down"
        assert scene.intrinsics[0].tolist() == [[20.0, 0, 16.5], [0, 22.0, 11.5], [0, 0, 1]]
        assert "notes" not in scene.report["source"]


def test_nerfstudio_frames_are_sorted_and_subsampled(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 12, name="{}.png")
    document = transforms(0)
    document["frames"] = [
        {"file_path": f"./images/{n}.png", "transform_matrix": opengl_pose(n)} for n in (11, 2, 10, 0, 1, *range(3, 10))
    ]
    write_transforms(tmp_path, document)
    scene = Scene.load(tmp_path, max_frames=3)
    assert scene.cam_to_world[:, 0, 3].tolist() == [0, 6, 11]
    assert (scene.rgb[:, 0, 0, 0] * 255).round().tolist() == [0, 60, 110]


def test_nerfstudio_missing_images_and_poses_are_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "images", 6)
    (tmp_path / "images" / "00002.png").unlink()
    document = transforms(6, k1=0.1)
    del document["frames"][4]["transform_matrix"]
    write_transforms(tmp_path, document)
    scene = Scene.load(tmp_path)
    assert scene.cam_to_world[:, 0, 3].tolist() == [0, 1, 3, 5]
    notes = " ".join(scene.report["source"]["notes"])
    assert "1 of 6 frames have no pose" in notes and "1 of 5 images are missing" in notes and "distortion" in notes
    assert all(note in caplog.text for note in scene.report["source"]["notes"])


def test_nerfstudio_finds_suffixes_and_shrunk_copies(tmp_path: Path) -> None:
    write_images(tmp_path / "images_4", 2, (12, 16))
    document = transforms(2)
    for entry in document["frames"]:
        entry["file_path"] = entry["file_path"].removesuffix(".png")
    write_transforms(tmp_path, document)
    scene = Scene.load(tmp_path)
    assert scene.image_size == (12, 16)
    assert scene.intrinsics[0].tolist() == [[10.0, 0, 8.25], [0, 11.0, 5.75], [0, 0, 1]]


def test_nerfstudio_field_of_view_and_per_frame_values(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    document = {"camera_angle_x": math.radians(90), "frames": transforms(2)["frames"]}
    document["frames"][1] |= {"fl_x": 64.0, "cx": 8.0, "w": 32, "h": 24}
    write_transforms(tmp_path, document)
    intrinsics = Scene.load(tmp_path).intrinsics
    torch.testing.assert_close(intrinsics[0], torch.tensor([[16.0, 0, 16], [0, 16, 12], [0, 0, 1]]))
    torch.testing.assert_close(intrinsics[1], torch.tensor([[64.0, 0, 8], [0, 64, 12], [0, 0, 1]]))


def test_nerfstudio_as_cameras_is_matched_by_name(tmp_path: Path) -> None:
    clip = write_images(tmp_path / "clip", 5)
    (clip / "00001.png").unlink()
    path = write_transforms(tmp_path, transforms(8))
    assert Scene.load(clip, cameras=path).cam_to_world[:, 0, 3].tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": []}, "expected nerfstudio json with a list of frames"),
        (
            {"frames": [{"transform_matrix": opengl_pose(0)}]},
            "expected a file_path in every frame, got none in frame 0",
        ),
        ({"camera_model": "OPENCV_FISHEYE"}, "expected a pinhole camera_model, got OPENCV_FISHEYE; undistort"),
        ({"fl_x": "wide"}, "00000.png: expected a camera, got could not convert"),
        ({"fl_x": 0}, r"intrinsics: expected positive focal lengths.*frame 0"),
    ],
)
def test_bad_nerfstudio_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_images(tmp_path / "images", 2)
    write_transforms(tmp_path, transforms(2, **change))
    with pytest.raises(UserError, match=rf"transforms\.json: .*{message}"):
        Scene.load(tmp_path)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1, 0], [0, 1]], r"expected transform_matrix \[4,4\], got \[2, 2\]"),
        ([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]], "expected a rotation .* in frame 1"),
        ([[1, 0, 0, math.nan], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "NaN or infinity in frame 1"),
        ("eye", "expected a camera"),
    ],
)
def test_bad_nerfstudio_poses(tmp_path: Path, matrix: object, message: str) -> None:
    write_images(tmp_path / "images", 2)
    document = transforms(2)
    document["frames"][1]["transform_matrix"] = matrix
    write_transforms(tmp_path, document)
    with pytest.raises(UserError, match=message):
        Scene.load(tmp_path)


def test_nerfstudio_without_focal_length_or_images_or_json(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    document = transforms(2)
    del document["fl_x"]
    path = write_transforms(tmp_path, document)
    with pytest.raises(UserError, match="neither fl_x nor camera_angle_x"):
        Scene.load(tmp_path)
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"expected images beside it, got none of 2 .*images/00000\.png"):
        Scene.load(tmp_path)
    path.write_text("{not json")
    with pytest.raises(UserError, match=r"transforms\.json: expected nerfstudio json"):
        Scene.load(tmp_path)
