"""Drawings of a camera path: from above, and in the scene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from u4d.view.paths import frustum_corners, path_spread
from u4d.view.splat import choose_viewpoint, splat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, TRUTH = "#22262e", "#8b93a1", "#3aa676"
TIME_COLOURS, TIME_RANGE = "plasma", (0.05, 0.82)  # the yellow end does not show on white
DRAWN_CAMERAS = 9
DRAWN_STILL = 1e-4  # less motion than this, in the unit of a scene a few units deep, is rounding
DEFAULT_INTRINSICS_HALF_WIDTH = 0.5  # tangent of half the view drawn where intrinsics are not known


def time_colours(count: int) -> np.ndarray:
    """[count,4] colours from the first frame's to the last one's."""
    import matplotlib

    return np.asarray(matplotlib.colormaps[TIME_COLOURS](np.linspace(*TIME_RANGE, max(count, 2))))[:count]


def draw_from_above(ax: Axes, path: Tensor, corners: Tensor | None, truth: Tensor | None, unit: str) -> None:
    """Plot x against z: the path coloured by time, where the cameras look, start and end, the true path beside it.

    Args:
        ax: where to.
        path: [N,4,4], OpenCV axes with z forward in the first frame.
        corners: [N,4,3] of `frustum_corners`, for the width of view; None where intrinsics are not known.
        truth: [M,4,4] in the same world, or None.
        unit: of the axes.
    """
    _draw_plane(ax, path, corners, truth, (0, 2), (1, 1))
    ax.set_xlabel(f"x: right{unit}")
    ax.set_ylabel(f"z: forward{unit}")
    ax.set_title("camera path from above")


def draw_from_the_side(ax: Axes, path: Tensor, corners: Tensor | None, truth: Tensor | None, unit: str) -> None:
    """Plot z against height; arguments as for `draw_from_above`."""
    _draw_plane(ax, path, corners, truth, (2, 1), (1, -1))
    ax.set_xlabel(f"z: forward{unit}")
    ax.set_ylabel(f"height{unit}")
    ax.set_title("camera path from the side")


def _draw_plane(
    ax: Axes, path: Tensor, corners: Tensor | None, truth: Tensor | None, axes: tuple[int, int], signs: tuple[int, int]
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Polygon

    flip = np.asarray(signs)
    centres = path[:, :3, 3].double().numpy()[:, axes] * flip
    true_centres = None if truth is None else truth[:, :3, 3].double().numpy()[:, axes] * flip
    every = centres if true_centres is None else np.concatenate([centres, true_centres])
    middle = (every.max(0) + every.min(0)) / 2
    half = float((every.max(0) - every.min(0)).max()) / 2
    half = half if half > DRAWN_STILL else 1.0
    colours = time_colours(len(centres))
    for n in np.unique(np.linspace(0, len(centres) - 1, DRAWN_CAMERAS).round().astype(int)):
        wedge = _view_wedge(path[n], None if corners is None else corners[n], axes, flip, 0.34 * half)
        ax.add_patch(Polygon(centres[n] + wedge, closed=True, facecolor=colours[n], alpha=0.2, linewidth=0))
        ax.plot(*(centres[n] + wedge[[1, 0, 2]]).T, color=colours[n], alpha=0.7, linewidth=0.9)
    if true_centres is not None:
        ax.plot(*true_centres.T, color=TRUTH, linewidth=4.5, alpha=0.45, solid_capstyle="round", label="true path")
    pieces = np.stack([centres[:-1], centres[1:]], 1)
    ax.add_collection(LineCollection(list(pieces), colors=list(colours[:-1]), linewidths=2.2, capstyle="round"))
    ends = ((0, "o", "start"), (-1, "s", "end"))
    for n, marker, word in ends if len(centres) > 1 else ends[:1]:
        ax.plot(*centres[n], marker, color=colours[n], markersize=8, markeredgecolor="white", label=word, zorder=5)
    box = ax.get_window_extent()
    for limit, centre, side in ((ax.set_xlim, middle[0], box.width), (ax.set_ylim, middle[1], box.height)):
        reach = 1.5 * half * side / min(box.width, box.height)
        limit(centre - reach, centre + reach)
    ax.set_aspect("equal", adjustable="box")
    ax.grid(color="#e8eaee", linewidth=0.8)
    ax.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)
    if path_spread(path) <= DRAWN_STILL:
        ax.text(0.5, 0.04, "the camera does not move", transform=ax.transAxes, ha="center", color=FAINT)


def _view_wedge(
    pose: Tensor, corners: Tensor | None, axes: tuple[int, int], flip: np.ndarray, reach: float
) -> np.ndarray:
    """Triangle [3,2] about the origin (apex, left, right edge of view) as seen in the plane of `axes`."""
    rotation = pose[:3, :3].double().numpy()
    sideways = rotation[:, 0] if 0 in axes else rotation[:, 1]
    half_width = DEFAULT_INTRINSICS_HALF_WIDTH
    if corners is not None:
        across = corners[1] - corners[0] if 0 in axes else corners[3] - corners[0]
        depth = (corners.mean(0) - pose[:3, 3].double()) @ pose[:3, 2].double()
        half_width = float(across.norm() / 2 / depth)
    edges = np.stack([np.zeros(3), rotation[:, 2] - half_width * sideways, rotation[:, 2] + half_width * sideways])
    return np.asarray(edges[:, axes] * flip * reach)


def draw_in_scene(
    ax: Axes,
    cloud: tuple[np.ndarray, np.ndarray],
    path: Tensor,
    intrinsics: Tensor,
    image_size: tuple[int, int],
    truth: Tensor | None,
    pixels: tuple[int, int],
) -> None:
    """Draw the scene's points, the path among them, and what a few of the cameras see.

    Args:
        ax: where to.
        cloud: points [P,3] in the same world as the path, colours [P,3] uint8.
        path: [N,4,4].
        intrinsics: [N,3,3].
        image_size: (H, W) of the clip.
        truth: [M,4,4] in the same world, or None.
        pixels: (height, width) to draw.
    """
    points, colours = cloud
    shown = np.unique(np.linspace(0, len(path) - 1, 3).round().astype(int))
    reach = 0.14 * float(np.median(np.linalg.norm(points - path[0, :3, 3].double().numpy(), axis=1)))
    corners = frustum_corners(intrinsics[shown], path[shown], image_size, reach).numpy()
    centres = path[:, :3, 3].double().numpy()
    lines = [centres] if truth is None else [centres, truth[:, :3, 3].double().numpy()]
    viewpoint = choose_viewpoint(points, np.concatenate([*lines, corners.reshape(-1, 3)]), pixels)
    ax.imshow(splat(points, colours, viewpoint), interpolation="bilinear")
    if truth is not None:
        ax.plot(*viewpoint.project(lines[1])[0].T, color=TRUTH, linewidth=4, alpha=0.55)
    tints = time_colours(len(path))
    places = viewpoint.project(centres)[0]
    for start, end, tint in zip(places[:-1], places[1:], tints[:-1], strict=True):
        ax.plot(*np.stack([start, end]).T, color=tint, linewidth=2.2, solid_capstyle="round")
    for n, box in zip(shown, corners, strict=True):
        frame = viewpoint.project(box)[0]
        ax.fill(*frame.T, color=tints[n], alpha=0.18, linewidth=0)
        apex = places[n]
        for corner in frame:
            ax.plot(*np.stack([apex, corner]).T, color=tints[n], linewidth=1.1)
        ax.plot(*frame[[0, 1, 2, 3, 0]].T, color=tints[n], linewidth=1.6)
    ax.set_xlim(0, pixels[1])
    ax.set_ylim(pixels[0], 0)
    ax.set_title("scene and cameras")
