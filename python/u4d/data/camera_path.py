"""Camera paths from files, and which of their poses belongs to which frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from u4d.data.footage import Footage
from u4d.errors import UserError


@dataclass(frozen=True, eq=False)
class CameraPath:
    """M cameras as their file gives them, in the project's conventions.

    Attributes:
        source: the file.
        cam_to_world: [M,4,4] float64, OpenCV axes, the file's unit.
        intrinsics: [M,3,3] float64, in pixels of the image size that the reader was asked for; None where the format
            has none.
        stamps: when, in the file's own unit; None where it does not say.
        seconds_per_stamp: that unit.
        names: the images that the poses belong to, without folder and suffix; None where it does not say.
    """

    source: Path
    cam_to_world: Tensor
    intrinsics: Tensor | None = None
    stamps: tuple[float, ...] | None = None
    seconds_per_stamp: float = 1.0
    names: tuple[str, ...] | None = None

    def take(self, indices: list[int]) -> CameraPath:
        """The cameras with these numbers, in this order."""
        return replace(
            self,
            cam_to_world=self.cam_to_world[indices],
            intrinsics=None if self.intrinsics is None else self.intrinsics[indices],
            stamps=None if self.stamps is None else tuple(self.stamps[i] for i in indices),
            names=None if self.names is None else tuple(self.names[i] for i in indices),
        )


def read_camera_path(path: Path, image_size: tuple[int, int]) -> CameraPath:
    """Read a camera path; the format is told by the content.

    Args:
        path: nerfstudio json, RealEstate10K text (19 columns) or TUM trajectory (8 columns).
        image_size: (H, W) of the images that the intrinsics are wanted for.
    Raises:
        UserError: missing, of no known format, or holding a camera that is none (the line or frame is named).
    """
    from u4d.data import nerfstudio, re10k, tum

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a camera path (nerfstudio json, RealEstate10K or TUM text)")
    if path.suffix.lower() == ".json":
        return nerfstudio.read_path(path, image_size)
    readers: dict[int, Callable[[Path], CameraPath]] = {
        re10k.COLUMNS: lambda file: re10k.read_path(file, image_size),
        tum.COLUMNS: tum.read_path,
    }
    rows = [fields for _, fields in data_lines(path) if not fields[0].startswith("http")]
    columns = len(rows[0]) if rows else 0
    if columns not in readers:
        raise UserError(
            f"{path}: expected a camera path with 19 columns (RealEstate10K) or 8 (TUM: t tx ty tz qx qy qz qw), "
            f"got {columns or 'no data'}"
        )
    return readers[columns](path)


def data_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number from 1, fields) of every line that is neither empty nor a # comment; commas separate too.

    Raises:
        UserError: the file can't be read as text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a text file, got one that can't be read ({error})") from error
    fields = [(i, line.replace(",", " ").split()) for i, line in enumerate(lines, 1)]
    return [(i, row) for i, row in fields if row and not row[0].startswith("#")]


def numbers(path: Path, line: int, fields: list[str], columns: int) -> list[float]:
    """The fields as numbers.

    Raises:
        UserError: another number of columns, or something that is no number; file and line are named.
    """
    if len(fields) != columns:
        raise UserError(f"{path}, line {line}: expected {columns} columns, got {len(fields)}")
    try:
        return [float(value) for value in fields]
    except ValueError as error:
        raise UserError(f"{path}, line {line}: expected {columns} numbers, got {error}") from error


def match_to_footage(path: CameraPath, footage: Footage, clip: Path) -> CameraPath:
    """The camera of each kept frame.

    Matched by image names where both sides have them, else one by one where the file holds a pose for every frame of
    the whole clip, else by time stamps: each frame takes the nearest pose in time, at most half a frame away.

    Raises:
        UserError: none of these is possible.
    """
    count = path.cam_to_world.shape[0]
    by_name = _match_names(path, footage)
    if by_name is not None:
        return path.take(by_name)
    if count == footage.total:
        return path.take(list(footage.kept))
    told = f"{path.source}: expected one pose for each of the {footage.total} frames of {clip}, got {count} poses"
    if path.stamps is None or footage.stamps is None:
        raise UserError(f"{told}; and there are no time stamps on both sides to match them by")
    unit = path.seconds_per_stamp if footage.names is None else 1.0  # image names carry the file's own unit
    return path.take(_match_stamps(np.asarray(path.stamps) * unit, footage, told))


def _match_stamps(stamps: np.ndarray, footage: Footage, told: str) -> list[int]:
    wanted = np.asarray(footage.stamps)
    if len(wanted) > 1:
        frame_gap = (wanted[-1] - wanted[0]) / (footage.kept[-1] - footage.kept[0])
    else:
        frame_gap = float(np.median(np.diff(np.sort(stamps)))) if len(stamps) > 1 else 0.0
    away = np.abs(wanted[:, None] - stamps[None, :])
    nearest = away.argmin(1)
    missing = away.min(1) > frame_gap * (0.5 + 1e-6)
    if missing.any():
        raise UserError(
            f"{told}; by time stamps {int(missing.sum())} of {len(wanted)} frames find no pose within half a frame "
            f"({frame_gap / 2:.6g}), first frame {footage.kept[int(missing.argmax())]} "
            f"(frames at {wanted[0]:.6f} to {wanted[-1]:.6f}, poses at {stamps.min():.6f} to {stamps.max():.6f})"
        )
    return [int(i) for i in nearest]


def _match_names(path: CameraPath, footage: Footage) -> list[int] | None:
    if path.names is None or footage.names is None or len(set(path.names)) != len(path.names):
        return None
    where = {name: i for i, name in enumerate(path.names)}
    return [where[name] for name in footage.names] if all(name in where for name in footage.names) else None
