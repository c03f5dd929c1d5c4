"""A picture of coloured points from a bird's place behind the cameras."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

YAW_RAD, PITCH_RAD = np.radians(-28.0), np.radians(24.0)
HALF_VIEW = 0.42  # tangent of half the horizontal field of view
INSIDE = 0.97  # share of the points that must be in the picture
CENTRING_STEPS = 4
SPLAT = (-1, 0, 1)


@dataclass(frozen=True)
class Viewpoint:
    """A pinhole camera looking at a scene: `rotation` [3,3] world-to-camera about `pivot` [3], `distance` behind it."""

    rotation: np.ndarray
    pivot: np.ndarray
    distance: float
    size: tuple[int, int]

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points [...,3] -> pixels [...,2] (x, y) and depth [...]."""
        local = (points - self.pivot) @ self.rotation.T
        depth = local[..., 2] + self.distance
        height, width = self.size
        focal = width / 2 / HALF_VIEW
        safe = np.maximum(depth, 1e-9)
        pixels = np.array([width, height]) / 2 + focal * local[..., :2] / safe[..., None]
        return pixels, depth


def choose_viewpoint(points: np.ndarray, must_show: np.ndarray, size: tuple[int, int]) -> Viewpoint:
    """Look from behind, above and the left of a camera at the origin (OpenCV axes), far enough to see everything.

    Args:
        points: [P,3], of which nearly all shall be seen.
        must_show: [Q,3], which all shall be seen.
        size: (H, W) of the picture in pixels.
    """
    turn_yaw = np.array([[np.cos(YAW_RAD), 0, -np.sin(YAW_RAD)], [0, 1, 0], [np.sin(YAW_RAD), 0, np.cos(YAW_RAD)]])
    turn_pitch = np.array(
        [[1, 0, 0], [0, np.cos(PITCH_RAD), -np.sin(PITCH_RAD)], [0, np.sin(PITCH_RAD), np.cos(PITCH_RAD)]]
    )
    rotation = turn_pitch @ turn_yaw
    low, high = np.quantile(points, [0.05, 0.95], axis=0)
    view = Viewpoint(rotation, (low + high) / 2, 0.0, size)
    for _ in range(CENTRING_STEPS):
        needed = [_needed_distance((part - view.pivot) @ rotation.T, size) for part in (points, must_show)]
        view = replace(view, distance=float(max(np.quantile(needed[0], INSIDE), needed[1].max()) * 1.03))
        seen = view.project(points)[0]
        edges = np.concatenate([np.quantile(seen, [1 - INSIDE, INSIDE], axis=0), view.project(must_show)[0]])
        off = (edges.max(0) + edges.min(0)) / 2 - np.array([size[1], size[0]]) / 2
        aside = np.append(off * view.distance * HALF_VIEW / (size[1] / 2), 0.0)
        view = replace(view, pivot=view.pivot + aside @ rotation)
    return view


def _needed_distance(local: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How far behind the pivot the eye must stand for each point to be in the picture."""
    half_height = HALF_VIEW * size[0] / size[1]
    beside = np.maximum(np.abs(local[:, 0]) / HALF_VIEW, np.abs(local[:, 1]) / half_height)
    return np.asarray(beside - local[:, 2])


def splat(points: np.ndarray, colours: np.ndarray, viewpoint: Viewpoint) -> np.ndarray:
    """Draw points as small squares, the nearer over the farther, on white.

    Args:
        points: [P,3].
        colours: [P,3] uint8.
        viewpoint: from where.
    Returns:
        [H,W,3] uint8.
    """
    height, width = viewpoint.size
    pixels, depth = viewpoint.project(points)
    order = np.argsort(-depth)
    order = order[depth[order] > 0.05 * viewpoint.distance]
    column, row = np.floor(pixels[order]).astype(np.int64).T
    canvas = np.full((height * width, 3), 255, np.uint8)
    offsets = [(dy, dx) for dy in SPLAT for dx in SPLAT]
    # Farther points are written first; interleaving the offsets keeps that order over whole squares.
    rows = np.stack([row + dy for dy, _ in offsets], 1).ravel()
    columns = np.stack([column + dx for _, dx in offsets], 1).ravel()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    canvas[rows[inside] * width + columns[inside]] = np.repeat(colours[order], len(offsets), 0)[inside]
    return canvas.reshape(height, width, 3)
