"""The rows of pictures in a summary: what was given, what came out, what is true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from u4d.data.footage import rgb_bytes
from u4d.geometry.depth import valid_depth
from u4d.sample.observation import parse_observation
from u4d.view.colours import colour_depth, disparity_range

if TYPE_CHECKING:
    from u4d.scene import Scene


@dataclass(frozen=True)
class TileRow:
    """One row of pictures.

    Attributes:
        label: what it shows.
        pictures: [h,w,3] uint8 each; None where there is none to show.
        disparities: range of the colours, where the row shows depth.
        absent: word for the places without a picture.
    """

    label: str
    pictures: list[np.ndarray | None]
    disparities: tuple[float, float] | None = None
    absent: str = ""


def tile_rows(result: Scene, source: Scene | None, truth: Scene | None, shown: list[int], width: int) -> list[TileRow]:
    """Rows for `write_summary`.

    Args:
        result: what came out.
        source: what was given, or None.
        truth: what is true, or None.
        shown: frames of the result.
        width: pixels that a picture need not exceed.
    """
    rows = []
    given = {} if source is None else given_frames(result, source)
    if source is not None and source.rgb is not None:
        pictures = [_rgb(source.rgb, given[i], width) if i in given else None for i in shown]
        rows.append(TileRow("input", pictures, absent="not given"))
    if result.rgb is not None:
        rows.append(TileRow("RGB", [_rgb(result.rgb, i, width) for i in shown]))
    if truth is not None and truth.rgb is not None and not given.keys() >= set(shown):
        rows.append(TileRow("true RGB", [_rgb(truth.rgb, _same_time(i, result, truth), width) for i in shown]))
    return rows + _depth_rows(result, truth, shown, width)


def _depth_rows(result: Scene, truth: Scene | None, shown: list[int], width: int) -> list[TileRow]:
    """Depth in colours that mean the same in both rows; where the units differ the result takes the truth's median."""
    depth, true_depth = result.depth, None if truth is None else truth.depth
    reference = depth if true_depth is None else true_depth
    if reference is None:
        return []
    disparities = disparity_range(reference)
    rows = []
    if depth is not None:
        ratio = 1.0 if true_depth is None else _median(true_depth) / _median(depth)
        label = "depth" if abs(ratio - 1) < 5e-3 else f"depth \N{MULTIPLICATION SIGN} {ratio:.3g}"
        rows.append(TileRow(label, [_depth(depth[i] * ratio, disparities, width) for i in shown], disparities))
    if truth is not None and true_depth is not None:
        frames = [_same_time(i, result, truth) for i in shown]
        rows.append(TileRow("true depth", [_depth(true_depth[i], disparities, width) for i in frames], disparities))
    return rows


def given_frames(result: Scene, source: Scene) -> dict[int, int]:
    """Frame of the result -> frame of the source, for frames whose picture the result was made from."""
    report = result.report
    if "slots" in report and "frames" in report:
        places = dict(zip(report["slots"], report["frames"], strict=True))
    else:
        places = {i: _same_time(i, result, source) for i in range(result.num_frames)}
    if "observe" not in report:
        return places
    given = parse_observation(report["observe"], source.num_frames).rgb
    return {slot: frame for slot, frame in places.items() if frame < source.num_frames and given[frame]}


def _same_time(frame: int, result: Scene, other: Scene) -> int:
    """The frame of `other` that shows the same moment, where the two have different numbers of frames."""
    if other.num_frames == result.num_frames or result.num_frames == 1:
        return min(frame, other.num_frames - 1)
    return round(frame * (other.num_frames - 1) / (result.num_frames - 1))


def _median(depth: Tensor) -> float:
    return float(depth[valid_depth(depth)].median())


def _rgb(rgb: Tensor, frame: int, width: int) -> np.ndarray:
    picture = rgb[frame]
    if picture.shape[-1] > width:
        size = (max(1, round(picture.shape[-2] * width / picture.shape[-1])), width)
        picture = torch.nn.functional.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    return rgb_bytes(picture)


def _depth(depth: Tensor, disparities: tuple[float, float], width: int) -> np.ndarray:
    step = max(1, depth.shape[-1] // width)
    return colour_depth(depth[::step, ::step], disparities)
