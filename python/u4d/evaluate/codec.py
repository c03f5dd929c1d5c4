"""What the codec alone loses: the ceiling for everything that a model decodes through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

from torch import Tensor

from u4d.errors import UserError
from u4d.evaluate.depth_metrics import ALIGNMENT_TEXT, depth_metrics
from u4d.evaluate.image_metrics import psnr, ssim
from u4d.evaluate.results import EvaluationReport, Row
from u4d.geometry.depth import clip_scale, depth_to_channel, fill_invalid
from u4d.model.streams import decoded_depth
from u4d.scene import Scene


class Reconstructs(Protocol):
    """A codec, there and back."""

    def reconstruct_rgb(self, rgb: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> the same."""
        ...

    def reconstruct_depth(self, channel: Tensor) -> Tensor:
        """[N, H, W] depth channel in [-1, 1] -> the same."""
        ...


def evaluate_codec(
    codec: Reconstructs,
    scenes: Iterable[Scene],
    *,
    clips: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> EvaluationReport:
    """PSNR per stream of encoding and decoding, and the depth error that it causes.

    Args:
        codec: with `reconstruct_rgb` and `reconstruct_depth`.
        scenes: clips with RGB, depth or both.
        clips: at most so many.
        progress: called as progress(clips done, clips in all or None if unknown).
    Returns:
        One row: `psnr` and `ssim` of RGB (peak 1); `psnr_depth` of the depth channel (peak 2, the range of [-1, 1]),
        filled pixels included, as the codec sees them; `abs_rel`, `rmse`, `delta_1_25` of depth after the way back, not
        aligned.
    Raises:
        UserError: no clip, a clip with neither RGB nor depth, or a reconstruction of another shape or not finite.
    """
    per_clip: list[dict[str, float]] = []
    started = time.perf_counter()
    for index, scene in enumerate(islice(scenes, clips)):
        if scene.rgb is None and scene.depth is None:
            raise UserError(f"clip {index}: expected rgb or depth, got cameras alone")
        per_clip.append(_rgb_values(codec, scene) | _depth_values(codec, scene))
        if progress is not None:
            progress(index + 1, clips)
    if not per_clip:
        raise UserError("scenes: expected at least one clip, got none")
    names = dict.fromkeys(name for values in per_clip for name in values)
    row = Row("codec", False, {name: tuple(v.get(name, float("nan")) for v in per_clip) for name in names})
    seconds = (time.perf_counter() - started) / len(per_clip)
    settings = {"psnr": "per frame, peak 1", "psnr_depth": "of the depth channel, per frame, peak 2"}
    alignments = {"depth": ALIGNMENT_TEXT["none"]}
    return EvaluationReport("codec reconstruction", settings, alignments, (row,), len(per_clip), seconds)


def _rgb_values(codec: Reconstructs, scene: Scene) -> dict[str, float]:
    if scene.rgb is None:
        return {}
    rgb = codec.reconstruct_rgb(scene.rgb).detach().cpu()
    values = {"psnr": psnr(rgb, scene.rgb)}
    return values | {"ssim": ssim(rgb, scene.rgb)} if min(scene.image_size) >= 11 else values


def _depth_values(codec: Reconstructs, scene: Scene) -> dict[str, float]:
    if scene.depth is None:
        return {}
    scale = clip_scale(scene.depth)
    channel = depth_to_channel(fill_invalid(scene.depth), scale)
    decoded = codec.reconstruct_depth(channel).detach().cpu()
    result = depth_metrics(decoded_depth(decoded, scale), scene.depth, alignment="none")
    depth_values = {name: result[name] for name in ("abs_rel", "rmse", "delta_1_25")}
    return {"psnr_depth": psnr(decoded, channel, peak=2.0), **depth_values}
