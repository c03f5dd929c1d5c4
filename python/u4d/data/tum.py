"""TUM trajectories: `t tx ty tz qx qy qz qw` per line, seconds, camera-to-world, # for comments."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from u4d.data.camera_path import CameraPath, data_lines, numbers
from u4d.errors import UserError
from u4d.geometry.cameras import check_rigid, quat_xyzw_to_rotation, rotation_to_quat_xyzw

COLUMNS = 8
UNIT_QUATERNION_TOLERANCE = 1e-2  # files with four decimals are off by 1e-4; a wrong column order by far more


def read_path(path: Path) -> CameraPath:
    """Read a TUM trajectory; it holds no intrinsics.

    Raises:
        UserError: a line of another shape, or a quaternion without unit length; the line is named.
    """
    rows = []
    for line, fields in data_lines(path):
        row = numbers(path, line, fields, COLUMNS)
        norm = float(torch.tensor(row[4:], dtype=torch.float64).norm())
        if not abs(norm - 1) < UNIT_QUATERNION_TOLERANCE:
            raise UserError(f"{path}, line {line}: expected a unit quaternion qx qy qz qw, got length {norm:g}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: expected a TUM trajectory, got no poses")
    table = torch.tensor(rows, dtype=torch.float64)
    cam_to_world = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    cam_to_world[:, :3, :3] = quat_xyzw_to_rotation(table[:, 4:])
    cam_to_world[:, :3, 3] = table[:, 1:4]
    check_rigid(cam_to_world, f"{path}: cam_to_world")
    return CameraPath(source=path, cam_to_world=cam_to_world, stamps=tuple(row[0] for row in rows))


def write_path(path: Path, cam_to_world: Tensor, fps: float) -> None:
    """Write [N,4,4] as a TUM trajectory, frame n at n / fps seconds."""
    poses = cam_to_world.detach().double().cpu()
    table = torch.cat([poses[:, :3, 3], rotation_to_quat_xyzw(poses[:, :3, :3])], 1)
    lines = ["# timestamp tx ty tz qx qy qz qw (camera-to-world, OpenCV axes)"]
    lines += [" ".join(f"{value:.9g}" for value in (n / fps, *row)) for n, row in enumerate(table.tolist())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
