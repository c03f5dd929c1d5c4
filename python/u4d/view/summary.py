"""summary.png: a result at a glance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from u4d.data.footage import even_indices
from u4d.geometry.cameras import relative_to_first
from u4d.view.colours import COLOUR_MAP
from u4d.view.facts import draw_facts, scene_facts
from u4d.view.path_plot import FAINT, INK, draw_from_above, draw_from_the_side, draw_in_scene
from u4d.view.paths import align_path, frustum_corners
from u4d.view.point_cloud import scene_points
from u4d.view.tiles import TileRow, tile_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from u4d.scene import Scene

DPI = 110
WIDTH, MARGIN, LABELS, BAR = 16.0, 0.35, 0.42, 0.95  # inches, like all lengths here
GAP, HEADER, PANEL, PANEL_GAP = 0.07, 0.95, 4.6, 0.45
TILES, MAX_TILES, MAX_ROWS, MAX_TILE_HEIGHT = 5, 9, 5, 2.6
FACTS_WIDTH, AXIS_ROOM = 3.7, 0.35
CLOUD_POINTS, CLOUD_FAR_MEDIANS = 150_000, 2.0
PALE = "#b4bac4"


def write_summary(
    path: str | Path,
    result: Scene,
    source: Scene | None,
    truth: Scene | None = None,
    errors: Mapping[str, Any] | None = None,
) -> None:
    """Draw one picture of a result: frames, depth, camera path, and how far it is from the truth.

    Args:
        path: the PNG to write.
        result: what to show. Its report, as `Pipeline.complete` writes it, says which input frames were given
            (`observe`, `frames`, `slots`; all of them where it does not) and whether lengths are metres (`metric`).
        source: what was given as input, same frames (another number of frames is spread over the clip), or None.
        truth: what is known to be true; its path and depth are shown beside the result's, which is laid over it.
        errors: name -> number or text, or name -> {column: number or text}, for a table.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, tile_height, tile_width = _tiling(result)
    shown = even_indices(result.num_frames, count)
    rows = tile_rows(result, source, truth, shown, round(tile_width * DPI * 1.5))
    heads = [f"frame {shown[0]}", *map(str, shown[1:])]
    if result.num_frames == 1 and rows:  # side by side: what is one column for a clip is one row for an image
        heads = [row.label for row in rows]
        rows = [TileRow("", [row.pictures[0] for row in rows], rows[-1].disparities)]
    height = HEADER + len(rows) * (tile_height + GAP) + PANEL_GAP + PANEL + MARGIN
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "text.color": INK,
        "axes.edgecolor": "#c9cdd4",
        "axes.labelcolor": FAINT,
    }
    style |= {"axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "axes.edgecolor": "#c9cdd4"}
    with rc_context({**style, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titleweight": "bold"}):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        _draw_header(figure, result, heads if rows else [], tile_width)
        for i, row in enumerate(rows):
            top = height - HEADER - i * (tile_height + GAP)
            _draw_row(figure, row, top, (tile_height, tile_width))
        _draw_colour_bar(figure, rows, height - HEADER, (tile_height, tile_width), _unit(result))
        _draw_panel(figure, result, truth, errors or {})
        figure.savefig(Path(path), dpi=DPI, pil_kwargs={"compress_level": 4})


def _tiling(result: Scene) -> tuple[int, float, float]:
    """Number of tiles in a row, and their height and width; narrow pictures make room for more of them."""
    pictures = result.rgb is not None or result.depth is not None
    aspect = result.image_size[1] / result.image_size[0] if pictures else 4 / 3
    room = WIDTH - 2 * MARGIN - LABELS - BAR
    fitting = math.ceil((room + GAP) / (MAX_TILE_HEIGHT * aspect + GAP))
    wanted = MAX_ROWS if result.num_frames == 1 else result.num_frames
    count = min(wanted, max(TILES, min(MAX_TILES, fitting)))
    width = min((room + GAP) / count - GAP, MAX_TILE_HEIGHT * aspect)
    return count, width / aspect, width


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float, bare: bool = False) -> Axes:
    """Axes at a place in inches from the lower left corner."""
    across, up = figure.get_size_inches()
    ax = figure.add_axes((left / across, bottom / up, width / across, height / up))
    if bare:
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return ax


def _unit(scene: Scene) -> str:
    return " m" if scene.report.get("metric") else ""


# --- pictures --------------------------------------------------------------------------------------------------------


def _draw_header(figure: Figure, result: Scene, heads: list[str], tile_width: float) -> None:
    across, up = figure.get_size_inches()
    pictures = result.rgb is not None or result.depth is not None
    size = f"{result.image_size[1]} \N{MULTIPLICATION SIGN} {result.image_size[0]}   " if pictures else ""
    frames = f"{result.num_frames} frame{'s' if result.num_frames != 1 else ''}   "
    facts = f"{frames}{size}{result.fps:.4g} fps"
    left, top = MARGIN + LABELS, up - 0.42
    caption = result.caption.strip().splitlines()[0] if result.caption.strip() else "u4d scene"
    words = caption if len(caption) <= 90 else caption[:89] + "\N{HORIZONTAL ELLIPSIS}"
    figure.text(left / across, top / up, words, fontsize=16, weight="bold", va="center", parse_math=False)
    figure.text((across - MARGIN - BAR) / across, top / up, facts, fontsize=11, color=FAINT, ha="right", va="center")
    for i, word in enumerate(heads):
        centre = left + i * (tile_width + GAP) + tile_width / 2
        figure.text(centre / across, (up - HEADER + 0.1) / up, word, fontsize=10, color=FAINT, ha="center")


def _draw_row(figure: Figure, row: TileRow, top: float, tile: tuple[float, float]) -> None:
    height, width = tile
    bottom, left = top - height, MARGIN + LABELS
    across, up = figure.get_size_inches()
    middle = (bottom + height / 2) / up
    figure.text((left - 0.2) / across, middle, row.label, rotation=90, ha="center", va="center", fontsize=11)
    for i, picture in enumerate(row.pictures):
        ax = _axes(figure, left + i * (width + GAP), bottom, width, height, bare=True)
        if picture is None:
            ax.set_facecolor("#f1f2f5")
            ax.text(0.5, 0.5, row.absent, transform=ax.transAxes, ha="center", va="center", color=PALE, fontsize=11)
        else:
            ax.imshow(picture, aspect="auto", interpolation="antialiased")


def _draw_colour_bar(figure: Figure, rows: list[TileRow], top: float, tile: tuple[float, float], unit: str) -> None:
    """One bar for all rows that show depth: near at the top, ticks evenly spaced in disparity like the colours."""
    import matplotlib

    places = [i for i, row in enumerate(rows) if row.disparities is not None]
    if not places:
        return
    far, near = rows[places[0]].disparities or (0.0, 1.0)
    height, width = tile
    bottom = top - places[-1] * (height + GAP) - height
    tall = len(places) * (height + GAP) - GAP
    left = MARGIN + LABELS + len(rows[0].pictures) * (width + GAP) + 0.08
    ax = _axes(figure, left, bottom + 0.06 * tall, 0.16, 0.88 * tall)
    table = matplotlib.colormaps[COLOUR_MAP](np.linspace(0.02, 0.98, 256))
    ax.imshow(table[:, None], aspect="auto", extent=(0, 1, 0, 1))
    ticks = np.linspace(0, 1, 5)
    depths = [1 / max(far + tick * (near - far), 1e-9) for tick in ticks]
    ax.set_xticks([])
    ax.set_yticks(ticks, [f"{depth:.3g}{unit}" for depth in depths], fontsize=9)
    ax.yaxis.tick_right()
    ax.tick_params(length=0, pad=4)
    for spine in ax.spines.values():
        spine.set_visible(False)


# --- camera path, scene, numbers -------------------------------------------------------------------------------------


def _draw_panel(figure: Figure, result: Scene, truth: Scene | None, errors: Mapping[str, Any]) -> None:
    bottom, left = MARGIN + 0.1, MARGIN + LABELS
    facts_left = left
    if result.cam_to_world is not None:
        placed, true_path = _placed(result, truth)
        unit = _unit(result if true_path is None or truth is None else truth)
        facts_left = WIDTH - MARGIN - FACTS_WIDTH
        side, beside = PANEL - 0.55, left + PANEL - 0.3
        _draw_paths(figure, placed, true_path, unit, (left, bottom, side), (beside, facts_left - 0.5 - beside))
    area = _axes(figure, facts_left, bottom, FACTS_WIDTH, PANEL - 0.25, bare=True)
    draw_facts(area, scene_facts(result, truth, _unit(result)), errors, FACTS_WIDTH, PANEL - 0.25)


def _draw_paths(
    figure: Figure,
    placed: Scene,
    true_path: Tensor | None,
    unit: str,
    place: tuple[float, float, float],
    beside: tuple[float, float],
) -> None:
    """The path from above at `place` (left, bottom, side), and `beside` (left, width) it the scene or the side view."""
    assert placed.cam_to_world is not None
    left, bottom, side = place
    path, intrinsics, corners = placed.cam_to_world, placed.intrinsics, None
    label = f" ({unit.strip()})" if unit else ""
    if intrinsics is not None and (placed.rgb is not None or placed.depth is not None):
        corners = frustum_corners(intrinsics, path, placed.image_size, 1.0)
    above = _axes(figure, left + AXIS_ROOM, bottom + AXIS_ROOM, side - AXIS_ROOM, side - AXIS_ROOM)
    draw_from_above(above, path, corners, true_path, label)
    if placed.depth is not None and intrinsics is not None:
        ax = _axes(figure, beside[0], bottom, beside[1], side, bare=True)
        cloud = scene_points(placed, CLOUD_POINTS, CLOUD_FAR_MEDIANS)
        pixels = (round(side * DPI), round(beside[1] * DPI))
        draw_in_scene(ax, cloud, path, intrinsics, placed.image_size, true_path, pixels)
    else:
        room = 2 * AXIS_ROOM
        ax = _axes(figure, beside[0] + room, bottom + AXIS_ROOM, beside[1] - room, side - AXIS_ROOM)
        draw_from_the_side(ax, path, corners, true_path, label)


def _placed(result: Scene, truth: Scene | None) -> tuple[Scene, Tensor | None]:
    """The result in its first camera's frame, and None; where the true path is known, the result laid over that one
    (in the truth's unit), both in the true first camera's frame."""
    assert result.cam_to_world is not None
    if truth is None or truth.cam_to_world is None or truth.num_frames != result.num_frames:
        return replace(result, cam_to_world=relative_to_first(result.cam_to_world)), None
    true_path = relative_to_first(truth.cam_to_world)
    path, scale = align_path(result.cam_to_world, true_path)
    depth = None if result.depth is None else result.depth * scale
    return replace(result, cam_to_world=path, depth=depth), true_path
