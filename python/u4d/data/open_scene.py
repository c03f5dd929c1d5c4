"""What `Scene.load` does: find out what a path holds, read it, and attach cameras."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from u4d.data import nerfstudio
from u4d.data.camera_path import CameraPath, match_to_footage, read_camera_path
from u4d.data.footage import Footage, even_indices
from u4d.data.images import IMAGE_SUFFIXES, image_files, read_images
from u4d.data.scene_folder import MARKER, load_scene_folder
from u4d.data.video import read_video
from u4d.errors import UserError
from u4d.geometry.cameras import resize_intrinsics
from u4d.scene import Scene

log = logging.getLogger("u4d")

NO_CLIP_SUFFIXES = frozenset({".txt", ".tum", ".csv", ".npz", ".npy", ".ply", ".yaml", ".yml", ".zip"})


def open_scene(
    path: Path, cameras: Path | None, max_frames: int | None, image_size: tuple[int, int] | None = None
) -> Scene:
    """Read a clip in any of the formats; see `Scene.load`. Notes on what was left out are logged and reported."""
    even_indices(1, max_frames)  # a wrong max_frames is told before anything is read
    if image_size is not None and (len(image_size) != 2 or any(int(side) != side or side < 1 for side in image_size)):
        raise UserError(f"image_size: expected (height, width) in whole pixels, got {image_size}")
    if not path.exists():
        raise UserError(f"{path}: expected a video, an image, a folder of images or a saved scene, got nothing there")
    notes: list[str] = []
    footage: Footage | None
    if path.is_dir() and (path / MARKER).is_file():
        scene, footage = load_scene_folder(path, max_frames)
    else:
        footage, own_path, notes = _read_clip(path, max_frames, image_size)
        scene = Scene(rgb=footage.rgb, fps=footage.fps, report={"source": _source(path, footage, notes)})
        if own_path is not None:
            scene = _attach(scene, own_path)
    if cameras is not None:
        if footage is None:
            raise UserError(f"{path}: expected a clip with pictures to attach {cameras} to, got one without")
        stored = footage.stored_size or scene.image_size
        scene = _attach(scene, match_to_footage(read_camera_path(cameras, stored), footage, path))
    if image_size is not None:
        scene = _resize_rest(scene, footage, image_size)
    for note in notes:
        log.warning(note)
    return scene


def _read_clip(
    path: Path, max_frames: int | None, image_size: tuple[int, int] | None
) -> tuple[Footage, CameraPath | None, list[str]]:
    """Footage, the cameras that come with it (for the stored size), and notes on what was left out."""
    if path.is_dir():
        if (path / nerfstudio.FILE_NAME).is_file():
            return nerfstudio.read_clip(path / nerfstudio.FILE_NAME, max_frames, image_size)
        files = image_files(path)
        if not files:
            kinds = " ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(
                f"{path}: expected a folder with images ({kinds}), {MARKER} or {nerfstudio.FILE_NAME}, got none"
            )
        return read_images(files, max_frames, image_size=image_size), None, []
    suffix = path.suffix.lower()
    if suffix == ".json":
        if path.name == MARKER:
            raise UserError(f"{path}: expected the folder of a saved scene, got the file in it; give {path.parent}")
        return nerfstudio.read_clip(path, max_frames, image_size)
    if suffix in IMAGE_SUFFIXES:
        return read_images([path], max_frames, image_size=image_size), None, []
    if suffix in NO_CLIP_SUFFIXES:
        raise UserError(
            f"{path}: expected a video, an image, a folder of images or a saved scene, got a {suffix} file "
            "(a camera path is attached to a clip with cameras=, --cameras on the command line)"
        )
    return read_video(path, max_frames, image_size), None, []


def _resize_rest(scene: Scene, footage: Footage | None, image_size: tuple[int, int]) -> Scene:
    """Bring to `image_size` what was not resized on reading: intrinsics, or everything."""
    if footage is None or footage.stored_size is None:
        return scene if scene.rgb is None and scene.depth is None else scene.resized(image_size)
    if scene.intrinsics is None:
        return scene
    return replace(scene, intrinsics=resize_intrinsics(scene.intrinsics, footage.stored_size, image_size))


def _source(path: Path, footage: Footage, notes: list[str]) -> dict[str, Any]:
    source: dict[str, Any] = {"path": str(path), "frames": footage.total, "kept": list(footage.kept)}
    return {**source, "notes": notes} if notes else source


def _attach(scene: Scene, path: CameraPath) -> Scene:
    """The scene with these cameras; its own intrinsics stay where the path has none."""
    intrinsics = scene.intrinsics if path.intrinsics is None else path.intrinsics.to(torch.float32)
    return replace(scene, cam_to_world=path.cam_to_world.to(torch.float32), intrinsics=intrinsics)
