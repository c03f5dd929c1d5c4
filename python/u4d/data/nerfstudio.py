"""nerfstudio's `transforms.json`: images with OpenGL camera-to-world poses.

OpenGL cameras look along -z with y up: negating the y and z columns gives OpenCV's axes. `applied_transform` is a
change of the world that the poses already hold, so it needs no undoing. Intrinsics may stand at the top or in each
frame, and belong to `w` x `h`, which real exports get wrong or which the images were shrunk from: they are brought to
the size of the images that are there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u4d.data.camera_path import CameraPath
from u4d.data.footage import Footage
from u4d.data.images import IMAGE_SUFFIXES, natural_key, read_images
from u4d.errors import UserError
from u4d.geometry.cameras import check_intrinsics, check_rigid, resize_intrinsics

FILE_NAME = "transforms.json"
PINHOLE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
SHRUNK_FOLDERS = ("images_2", "images_4", "images_8")  # what nerfstudio and DL3DV call smaller copies of `images`


def read_path(path: Path, image_size: tuple[int, int]) -> CameraPath:
    """The cameras of a `transforms.json`, sorted by image name; entries without a pose are left out.

    Args:
        path: the json file.
        image_size: (H, W) of the images that the intrinsics are wanted for.
    Raises:
        UserError: not such a file, or a camera that is none; the frame is named.
    """
    document, entries = _read(path)
    return _cameras(path, document, [e for e in entries if "transform_matrix" in e], image_size)


def read_clip(
    path: Path, max_frames: int | None = None, image_size: tuple[int, int] | None = None
) -> tuple[Footage, CameraPath, list[str]]:
    """Images and cameras of a `transforms.json`, and notes on what was left out.

    Args:
        path: the json file.
        max_frames: keep at most so many of the frames that are there, evenly spaced.
        image_size: (H, W) to which every picture is resized as soon as it is read; the cameras stay at the stored size.
    Raises:
        UserError: as `read_path`; or none of the images is there.
    """
    document, entries = _read(path)
    posed = [e for e in entries if "transform_matrix" in e]
    found = [(e, file) for e in posed if (file := _image_file(path.parent, e["file_path"])) is not None]
    notes = []
    if len(posed) < len(entries):
        notes.append(f"{path}: {len(entries) - len(posed)} of {len(entries)} frames have no pose and are left out")
    if len(found) < len(posed):
        notes.append(f"{path}: {len(posed) - len(found)} of {len(posed)} images are missing and are left out")
    if not found:
        first = f", first {path.parent / posed[0]['file_path']}" if posed else ""
        raise UserError(f"{path}: expected images beside it, got none of {len(posed)} with a pose{first}")
    if any(float(e.get(key, document.get(key, 0)) or 0) != 0 for e, _ in found for key in DISTORTION):
        notes.append(f"{path}: lens distortion (k1..p2) is not corrected; undistort the images for exact geometry")
    footage = read_images([file for _, file in found], max_frames, image_size=image_size)
    height, width = footage.stored_size or footage.rgb.shape[-2:]
    kept = [found[i][0] for i in footage.kept]
    return footage, _cameras(path, document, kept, (height, width)), notes


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The document, and its frames in natural order of their images."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected nerfstudio json, got a file that can't be read ({error})") from error
    entries = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected nerfstudio json with a list of frames, got none")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("file_path"), str):
            raise UserError(f"{path}: expected a file_path in every frame, got none in frame {i}")
    model = document.get("camera_model", "OPENCV")
    if model not in PINHOLE_MODELS:
        raise UserError(f"{path}: expected a pinhole camera_model, got {model}; undistort the images first")
    return document, sorted(entries, key=lambda entry: natural_key(entry["file_path"]))


def _image_file(folder: Path, name: str) -> Path | None:
    """The image of an entry: as named, with a suffix that was left out, or in a folder of shrunk copies."""
    named = folder / name
    homes = [named, *(named.parent.parent / shrunk / named.name for shrunk in SHRUNK_FOLDERS)]
    for home in homes:
        if home.is_file():
            return home
        for suffix in sorted(IMAGE_SUFFIXES) if home.suffix.lower() not in IMAGE_SUFFIXES else ():
            if (whole := home.with_name(home.name + suffix)).is_file():
                return whole
    return None


def _cameras(
    path: Path, document: dict[str, Any], entries: list[dict[str, Any]], image_size: tuple[int, int]
) -> CameraPath:
    if not entries:
        raise UserError(f"{path}: expected frames with a transform_matrix, got none")
    matrices, intrinsics = [], []
    for entry in entries:
        try:
            matrix = torch.tensor(entry["transform_matrix"], dtype=torch.float64)
            intrinsics.append(_intrinsics({**document, **entry}, image_size))
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{path}: frame {entry['file_path']}: expected a camera, got {error}") from error
        if matrix.shape not in ((4, 4), (3, 4)):
            got = list(matrix.shape)
            raise UserError(f"{path}: frame {entry['file_path']}: expected transform_matrix [4,4], got {got}")
        bottom = matrix.new_tensor([[0, 0, 0, 1]])
        matrices.append(matrix if matrix.shape[0] == 4 else torch.cat([matrix, bottom]))
    opengl_to_opencv = torch.diag(torch.tensor([1, -1, -1, 1], dtype=torch.float64))
    cam_to_world = torch.stack(matrices) @ opengl_to_opencv
    check_rigid(cam_to_world, f"{path}: transform_matrix")
    stacked = torch.stack(intrinsics)
    check_intrinsics(stacked, f"{path}: intrinsics")
    names = tuple(Path(entry["file_path"]).stem for entry in entries)
    return CameraPath(source=path, cam_to_world=cam_to_world, intrinsics=stacked, names=names)


def _intrinsics(values: dict[str, Any], image_size: tuple[int, int]) -> Tensor:
    """One frame's [3,3], in pixels of `image_size`."""
    height, width = float(values.get("h", image_size[0])), float(values.get("w", image_size[1]))
    if "fl_x" in values:
        focal_x = float(values["fl_x"])
    elif "camera_angle_x" in values:
        focal_x = width / 2 / math.tan(float(values["camera_angle_x"]) / 2)
    else:
        raise KeyError("neither fl_x nor camera_angle_x")
    focal_y = float(values.get("fl_y", focal_x))
    centre_x, centre_y = float(values.get("cx", width / 2)), float(values.get("cy", height / 2))
    rows = [[focal_x, 0, centre_x], [0, focal_y, centre_y], [0, 0, 1]]
    own = torch.tensor(rows, dtype=torch.float64)
    return resize_intrinsics(own, (int(height), int(width)), image_size)
