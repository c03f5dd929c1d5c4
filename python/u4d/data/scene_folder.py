"""The saved scene folder (spec, section 6): written at once, read back as the same scene.

    scene.json       format, version, cameras, scale, fps, caption, report
    rgb.mp4          or rgb/000000.png, 000001.png, ... (lossless)
    depth.npz        `depth` [N,H,W] float32, invalid = 0; depth.mp4 shows it in colour
    report.npz       arrays of the report that are too large for text
    trajectory.tum   camera-to-world, for evo and others
    points.ply       coloured world points
    summary.png      the result at a glance

Only the parts that the scene has are there. The reader needs scene.json, rgb, depth.npz and report.npz; the others are
for people and other programs.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from u4d.data.atomic import new_folder
from u4d.data.footage import Footage, rgb_bytes
from u4d.data.images import image_files, read_images, write_png
from u4d.data.tum import write_path
from u4d.data.video import read_video, write_video
from u4d.errors import UserError

if TYPE_CHECKING:
    from u4d.scene import Scene

MARKER = "scene.json"
FORMAT = "u4d-scene"
VERSION = 1
VIDEO, PICTURES = "rgb.mp4", "rgb/%06d.png"
DEPTH, REPORT_ARRAYS = "depth.npz", "report.npz"
ARRAY_KEY = "u4d_array"
MAX_LISTED = 1024  # larger arrays of the report go to report.npz
MAX_POINTS = 200_000


def save_scene(
    scene: Scene,
    folder: Path,
    lossless: bool,
    overwrite: bool,
    source: Scene | None,
    truth: Scene | None,
    errors: dict[str, Any] | None,
) -> Path:
    """Write the folder; see `Scene.save`."""
    from u4d.view.summary import write_summary

    scene = _on_cpu(scene)
    with new_folder(folder, MARKER, overwrite) as partial:
        if scene.rgb is not None:
            _write_rgb(partial, scene.rgb, scene.fps, lossless)
        if scene.depth is not None:
            _write_depth(partial, scene.depth, scene.fps)
        if scene.cam_to_world is not None:
            write_path(partial / "trajectory.tum", scene.cam_to_world, scene.fps)
        if scene.depth is not None and scene.cam_to_world is not None and scene.intrinsics is not None:
            _write_points(partial / "points.ply", scene)
        write_summary(partial / "summary.png", scene, source, truth, errors)
        _write_document(partial, scene, lossless)
    return folder


def load_scene_folder(folder: Path, max_frames: int | None = None) -> tuple[Scene, Footage | None]:
    """Read a saved scene, and its pictures as footage (for matching cameras), None where it has none.

    Raises:
        UserError: a part that is missing, damaged, or does not fit the others; the file is named.
    """
    from u4d.data.footage import even_indices, kept_fps
    from u4d.scene import Scene

    file = folder / MARKER
    document = _read_document(file)
    total, fps = document["num_frames"], document["fps"]
    kept = even_indices(total, max_frames)
    footage = _read_rgb(folder, document, max_frames)
    depth = _read_depth(folder, document)
    try:
        scene = Scene(
            rgb=None if footage is None else footage.rgb,
            depth=None if depth is None else depth[kept],
            intrinsics=_matrices(document, "intrinsics", kept),
            cam_to_world=_matrices(document, "cam_to_world", kept),
            caption=document["caption"],
            fps=kept_fps(fps, total, len(kept)),
            scale=document["scale"],
            report=_restore_arrays(document["report"], folder / REPORT_ARRAYS),
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return scene, footage


def _on_cpu(scene: Scene) -> Scene:
    parts = {name: getattr(scene, name) for name in ("rgb", "depth", "intrinsics", "cam_to_world")}
    return replace(scene, **{name: part.detach().cpu() for name, part in parts.items() if part is not None})


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_rgb(folder: Path, rgb: Tensor, fps: float, lossless: bool) -> None:
    pictures = (rgb_bytes(frame) for frame in rgb)
    if not lossless:
        write_video(folder / VIDEO, pictures, fps)
        return
    (folder / PICTURES).parent.mkdir()
    for i, picture in enumerate(pictures):
        write_png(folder / (PICTURES % i), picture)


def _write_depth(folder: Path, depth: Tensor, fps: float) -> None:
    from u4d.view.colours import colour_depth, disparity_range

    np.savez_compressed(folder / DEPTH, depth=depth.numpy())
    shown = disparity_range(depth)
    write_video(folder / "depth.mp4", (colour_depth(frame, shown) for frame in depth), fps)


def _write_points(path: Path, scene: Scene) -> None:
    from u4d.view.point_cloud import scene_points, write_ply

    write_ply(path, *scene_points(scene, MAX_POINTS))


def _write_document(folder: Path, scene: Scene, lossless: bool) -> None:
    arrays: dict[str, Any] = {}
    report = _json_safe(scene.report, arrays, "report")
    if arrays:
        np.savez_compressed(folder / REPORT_ARRAYS, **arrays)
    parts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "conventions": "OpenCV camera-to-world; pixels, the first centre at (0.5, 0.5); depth 0 is invalid",
        "num_frames": scene.num_frames,
        "image_size": None if scene.rgb is None and scene.depth is None else list(scene.image_size),
        "fps": scene.fps,
        "scale": scene.scale,
        "caption": scene.caption,
        "rgb": None if scene.rgb is None else PICTURES if lossless else VIDEO,
        "depth": None if scene.depth is None else DEPTH,
        "intrinsics": None if scene.intrinsics is None else scene.intrinsics.tolist(),
        "cam_to_world": None if scene.cam_to_world is None else scene.cam_to_world.tolist(),
        "report": report,
    }
    lines = [f"  {json.dumps(key)}: {_dump(key, value)}" for key, value in parts.items()]
    (folder / MARKER).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _dump(key: str, value: Any) -> str:
    """JSON on one line, or one line per camera; numbers keep every digit (float32 -> shortest exact float64)."""
    if key in ("intrinsics", "cam_to_world") and value is not None:
        return "[\n    " + ",\n    ".join(json.dumps(matrix) for matrix in value) + "\n  ]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _json_safe(value: Any, arrays: dict[str, np.ndarray], where: str) -> Any:
    """`value` in JSON's types: NaN and infinity become null, large arrays a reference into `arrays`."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray) and value.size > MAX_LISTED and value.dtype.kind in "biuf":
        arrays[where] = value
        return {ARRAY_KEY: where}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _json_safe(item, arrays, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item, arrays, f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_document(file: Path) -> dict[str, Any]:
    """scene.json with every field checked for its type; the scene checks the values."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected a saved scene's json, got a file that can't be read ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{file}: expected a saved scene (format {FORMAT!r}), got another json file")
    if document.get("version") != VERSION:
        raise UserError(f"{file}: expected version {VERSION}, got {document.get('version')!r}; update u4d to read it")
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "num_frames": ("a whole number from 1", lambda v: type(v) is int and v >= 1),
        "image_size": ("[height, width] or null", lambda v: v is None or _is_size(v)),
        "fps": ("a number", lambda v: type(v) in (int, float)),
        "scale": ("a number or null", lambda v: v is None or type(v) in (int, float)),
        "caption": ("text", lambda v: isinstance(v, str)),
        "rgb": (f"{VIDEO}, {PICTURES} or null", lambda v: v in (None, VIDEO, PICTURES)),
        "depth": (f"{DEPTH} or null", lambda v: v in (None, DEPTH)),
        "intrinsics": ("a list of 3x3 matrices or null", lambda v: v is None or isinstance(v, list)),
        "cam_to_world": ("a list of 4x4 matrices or null", lambda v: v is None or isinstance(v, list)),
        "report": ("an object", lambda v: isinstance(v, dict)),
    }
    for key, (wanted, holds) in checks.items():
        if key not in document or not holds(document[key]):
            raise UserError(f"{file}: {key}: expected {wanted}, got {json.dumps(document.get(key))[:60]}")
    return document


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and v >= 1 for v in value)


def _matrices(document: dict[str, Any], key: str, kept: list[int]) -> Tensor | None:
    if document[key] is None:
        return None
    try:
        matrices = torch.tensor(document[key], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: expected a list of matrices of numbers, got {error}") from error
    if matrices.shape[0] != document["num_frames"]:
        raise UserError(f"{key}: expected {document['num_frames']} matrices, got {matrices.shape[0]}")
    return matrices[kept].float()


def _read_rgb(folder: Path, document: dict[str, Any], max_frames: int | None) -> Footage | None:
    if document["rgb"] is None:
        return None
    fps, total = document["fps"], document["num_frames"]
    if document["rgb"] == VIDEO:
        file = folder / VIDEO
        if not file.is_file():
            raise UserError(f"{file}: the saved scene's pictures are missing")
        footage = read_video(file, max_frames)
    else:
        file = folder / "rgb"
        files = image_files(file) if file.is_dir() else []
        if not files:
            raise UserError(f"{file}: the saved scene's pictures are missing")
        footage = read_images(files, max_frames, fps)
    if footage.total != total:
        raise UserError(f"{file}: expected {total} frames as {MARKER} says, got {footage.total}")
    height, width = document["image_size"] or footage.rgb.shape[-2:]
    stored = tuple(footage.rgb.shape[-2:])
    padded = (height + height % 2, width + width % 2) if document["rgb"] == VIDEO else (height, width)
    if stored != padded:
        raise UserError(
            f"{file}: expected {width}x{height} (width x height) as {MARKER} says, got {stored[1]}x{stored[0]}"
        )
    return replace(footage, rgb=footage.rgb[..., :height, :width].contiguous())


def _read_depth(folder: Path, document: dict[str, Any]) -> Tensor | None:
    if document["depth"] is None:
        return None
    file = folder / DEPTH
    depth = _read_arrays(file, ["depth"])["depth"]
    wanted = [document["num_frames"], *(document["image_size"] or [])]
    if list(depth.shape) != wanted or depth.dtype != np.float32:
        got = f"{depth.dtype} {list(depth.shape)}"
        raise UserError(f"{file}: expected depth float32 {wanted} as {MARKER} says, got {got}")
    return torch.from_numpy(depth)


def _read_arrays(file: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Arrays of an npz. Pickled objects are refused: they could run code."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except FileNotFoundError as error:
        raise UserError(f"{file}: the saved scene says that it is here, but it is missing") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: expected arrays {names}, got a file that can't be read ({error})") from error


def _restore_arrays(value: Any, file: Path) -> Any:
    """Put the arrays of report.npz back where `_json_safe` took them out."""
    if isinstance(value, dict):
        name = value.get(ARRAY_KEY)
        if len(value) == 1 and isinstance(name, str):
            return torch.from_numpy(_read_arrays(file, [name])[name])
        return {key: _restore_arrays(item, file) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore_arrays(item, file) for item in value]
    return value
