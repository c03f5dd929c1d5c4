"""A scene as coloured world points, and the PLY files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from u4d.data.footage import rgb_bytes
from u4d.errors import UserError
from u4d.geometry.depth import valid_depth
from u4d.geometry.points import unproject
from u4d.view.colours import colour_depth, disparity_range

if TYPE_CHECKING:
    from u4d.scene import Scene

MAX_STEP = 0.15  # relative change of disparity to a neighbour: more is an edge, or a surface seen edge-on
MAX_BEND = 0.04  # relative second difference: disparity of a plane is linear in the picture, at an edge it bends
FAR_MEDIANS = 8.0  # points farther than so many median depths are sky more often than surface


def surface_mask(depth: Tensor) -> Tensor:
    """Where a pixel surely lies on a surface: valid, not at a depth edge and not next to an invalid pixel.

    Depth maps are smooth across edges, so pixels there hang in the air between two surfaces. Disparity is what is
    looked at, since it is linear over a plane however slanted: its second difference shows edges alone.

    Args:
        depth: [..., H, W]; invalid pixels are 0.
    Returns:
        [..., H, W] bool.
    """
    valid = valid_depth(depth)
    disparity = 1 / torch.where(valid, depth, torch.full_like(depth, torch.inf))
    keep = valid.clone()
    for dim in (-1, -2):
        before, here, after = _neighbours(disparity, dim)
        step = torch.maximum((here - before).abs(), (after - here).abs())
        bend = (before + after - 2 * here).abs()
        # At the border the missing neighbour repeats the pixel, which bends every slanted plane: the step must do.
        keep &= (step <= MAX_STEP * here) & ((bend <= MAX_BEND * here) | _at_border(here, dim))
    return keep


def _neighbours(image: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(before, here, after) along `dim`; the border repeats itself."""
    size = image.shape[dim]
    before = torch.cat([image.narrow(dim, 0, 1), image.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([image.narrow(dim, 1, size - 1), image.narrow(dim, size - 1, 1)], dim)
    return before, image, after


def _at_border(image: Tensor, dim: int) -> Tensor:
    place = torch.arange(image.shape[dim], device=image.device)
    border = (place == 0) | (place == image.shape[dim] - 1)
    return border if dim == -1 else border[:, None]


def scene_points(
    scene: Scene, max_points: int, far_medians: float = FAR_MEDIANS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """World points of a whole clip, a fair random choice of its surface pixels.

    Args:
        scene: with depth, intrinsics and cam_to_world; without rgb the points take the colour of their depth.
        max_points: at most so many.
        far_medians: leave out what is farther than so many median depths.
        seed: of the choice.
    Returns:
        points [P,3] float32 in the scene's unit, colours [P,3] uint8.
    Raises:
        UserError: depth or cameras are not known.
    """
    depth, intrinsics, cam_to_world = scene.depth, scene.intrinsics, scene.cam_to_world
    if depth is None or intrinsics is None or cam_to_world is None:
        raise UserError("scene: expected depth, intrinsics and cam_to_world to make points, got a scene without")
    valid = valid_depth(depth)
    near = valid & (depth <= far_medians * depth[valid].median())
    surface = torch.stack([surface_mask(frame) for frame in depth]) & near
    candidates = (surface if bool(surface.any()) else near).flatten().nonzero().flatten()
    if len(candidates) > max_points:
        chosen = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:max_points]
        candidates = candidates[chosen.sort().values]
    shown = disparity_range(depth)
    pixels = depth[0].numel()
    bounds = torch.searchsorted(candidates, torch.arange(len(depth) + 1) * pixels).tolist()
    points, colours = [np.zeros((0, 3), np.float32)], [np.zeros((0, 3), np.uint8)]
    for n, frame in enumerate(depth):
        inside = candidates[bounds[n] : bounds[n + 1]] - n * pixels
        world = unproject(frame[None, None], intrinsics[None, n : n + 1], cam_to_world[None, n : n + 1])[0, 0]
        points.append(world.flatten(1)[:, inside].T.float().numpy())
        picture = colour_depth(frame, shown) if scene.rgb is None else rgb_bytes(scene.rgb[n])
        colours.append(picture.reshape(-1, 3)[inside.numpy()])
    return np.concatenate(points), np.concatenate(colours)


def write_ply(path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    """Write a binary little-endian PLY that MeshLab, CloudCompare, Blender and Open3D read.

    Args:
        path: where to.
        points: [P,3].
        colours: [P,3] uint8.
    """
    properties = [(axis, "<f4", "float") for axis in "xyz"] + [(c, "u1", "uchar") for c in ("red", "green", "blue")]
    vertices = np.empty(len(points), dtype=[(name, kind) for name, kind, _ in properties])
    for i, (name, _, _) in enumerate(properties):
        vertices[name] = points[:, i] if i < 3 else colours[:, i - 3]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        "comment world points, OpenCV axes (x right, y down, z forward)",
        f"element vertex {len(points)}",
        *(f"property {word} {name}" for name, _, word in properties),
        "end_header\n",
    ]
    path.write_bytes("\n".join(header).encode("ascii") + vertices.tobytes())
