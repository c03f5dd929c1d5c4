"""The numbers in a summary: what the result is, and how far it is from the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from u4d.geometry.cameras import invert_rigid, rotation_angle_rad
from u4d.geometry.depth import valid_depth
from u4d.view.colours import MAX_SAMPLES
from u4d.view.path_plot import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from u4d.scene import Scene

LINE, CHARACTER = 0.27, 0.082  # inches, at 10 points
RULE = "#d9dce2"
MISSING = "\N{EN DASH}"


def scene_facts(result: Scene, truth: Scene | None, unit: str) -> list[tuple[str, str]]:
    """(name, value) of what is worth knowing about a result; the true value follows where it is known."""
    facts = []
    if result.intrinsics is not None and (result.rgb is not None or result.depth is not None):
        facts.append(("field of view", _field_of_view(result)))
        if truth is not None and truth.intrinsics is not None and (truth.rgb is not None or truth.depth is not None):
            facts.append(("true field of view", _field_of_view(truth)))
    if result.depth is not None:
        valid = result.depth[valid_depth(result.depth)]
        ordered = valid[:: max(1, valid.numel() // MAX_SAMPLES)].float().sort().values
        low, median, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in (0.02, 0.5, 0.98))
        facts.append(("depth, 2 to 98 %", f"{low:.3g} to {high:.3g}{unit}"))
        facts.append(("median depth", f"{median:.3g}{unit}"))
    if result.cam_to_world is not None:
        steps = result.cam_to_world[1:, :3, 3] - result.cam_to_world[:-1, :3, 3]
        turn = invert_rigid(result.cam_to_world[0]) @ result.cam_to_world[-1]
        facts.append(("path length", f"{float(steps.norm(dim=-1).sum()):.3g}{unit}"))
        angle = math.degrees(float(rotation_angle_rad(turn[:3, :3])))
        facts.append(("turn, first to last", f"{angle:.3g}\N{DEGREE SIGN}"))
    if result.scale is not None:
        facts.append(("scale", f"{result.scale:.4g}"))
    return facts


def _field_of_view(scene: Scene) -> str:
    assert scene.intrinsics is not None
    height, width = scene.image_size
    focal = scene.intrinsics.double().median(0).values
    horizontal = math.degrees(2 * math.atan(width / 2 / float(focal[0, 0])))
    vertical = math.degrees(2 * math.atan(height / 2 / float(focal[1, 1])))
    return f"{horizontal:.1f}\N{DEGREE SIGN} \N{MULTIPLICATION SIGN} {vertical:.1f}\N{DEGREE SIGN}"


def draw_facts(ax: Axes, facts: list[tuple[str, str]], errors: Mapping[str, Any], width: float, height: float) -> None:
    """Write facts and, under them, the table of errors into empty axes of `width` x `height` inches."""
    columns = _columns(errors)
    named = columns != [""]
    lines = len(facts) + (2 + named + len(errors) if errors else 0) + 1
    line = min(LINE, height / max(lines, 1))
    font = 10 * line / LINE
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    y = height - line
    for name, value in facts:
        ax.text(0, y, name, fontsize=font, color=FAINT, va="center")
        ax.text(width, y, value, fontsize=font, color=INK, ha="right", va="center")
        y -= line
    if not errors:
        return
    y -= 0.6 * line
    ax.text(0, y, "errors against the truth", fontsize=1.1 * font, weight="bold", va="center")
    y -= line * named
    places = _column_places(columns, errors, width, line / LINE)
    for place, column in zip(places, columns, strict=True):
        ax.text(place, y, column, fontsize=font, color=FAINT, ha="right", va="center")
    for name, entry in errors.items():
        ax.plot([0, width], [y - line / 2] * 2, color=RULE, linewidth=0.8)
        y -= line
        ax.text(0, y, name, fontsize=font, color=FAINT, va="center")
        values = entry if isinstance(entry, Mapping) else {columns[0]: entry}
        for i, (place, column) in enumerate(zip(places, columns, strict=True)):
            weight = "bold" if i == 0 else "normal"
            ax.text(place, y, _number(values.get(column)), fontsize=font, ha="right", va="center", weight=weight)


def _column_places(columns: list[str], errors: Mapping[str, Any], width: float, size: float) -> list[float]:
    """Right edges of the columns, each as wide as its longest entry; the last one ends at `width`."""
    tables = [entry if isinstance(entry, Mapping) else {columns[0]: entry} for entry in errors.values()]
    longest = [max(len(column), *(len(_number(table.get(column))) for table in tables)) for column in columns]
    after = [sum(longest[i + 1 :]) * CHARACTER * size + (len(columns) - 1 - i) * 0.16 for i in range(len(columns))]
    return [width - skip for skip in after]


def _columns(errors: Mapping[str, Any]) -> list[str]:
    """Column names in the order in which they come up; one without a name where every entry is a plain value."""
    names = [name for entry in errors.values() if isinstance(entry, Mapping) for name in entry]
    return list(dict.fromkeys(names)) or [""]


def _number(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, torch.Tensor):
        value = value.item()
    return f"{value:.3g}" if isinstance(value, float | int) else str(value)
