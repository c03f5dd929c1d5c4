"""What a codec loses, measured with codecs whose loss is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.evaluate.codec import evaluate_codec
from u4d.evaluate.image_metrics import PSNR_CEILING_DB
from u4d.geometry.cameras import fov_to_intrinsics
from u4d.scene import Scene


@dataclass
class OffsetCodec:
    """Adds a constant to either stream."""

    rgb: float = 0.0
    depth: float = 0.0

    def reconstruct_rgb(self, rgb: Tensor) -> Tensor:
        return rgb + self.rgb

    def reconstruct_depth(self, channel: Tensor) -> Tensor:
        return channel + self.depth


def clip() -> Scene:
    depth = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0)) + 1
    depth[0, 0, 0] = 0.0
    return Scene(rgb=torch.full((3, 3, 12, 16), 0.5), depth=depth)


def test_a_lossless_codec_loses_nothing() -> None:
    row = evaluate_codec(OffsetCodec(), [clip(), clip()]).row("codec")
    assert row.summary("psnr").mean == pytest.approx(PSNR_CEILING_DB)
    assert row.summary("psnr_depth").mean == pytest.approx(PSNR_CEILING_DB)
    assert row.summary("abs_rel").mean == pytest.approx(0, abs=1e-6)
    assert row.summary("ssim").count == 2


def test_known_losses() -> None:
    row = evaluate_codec(OffsetCodec(rgb=0.1, depth=-0.02), [clip()]).row("codec")
    assert row.summary("psnr").mean == pytest.approx(20, rel=1e-4)
    assert row.summary("psnr_depth").mean == pytest.approx(20 * math.log10(2 / 0.02), rel=1e-4)
    # d(depth)/depth = -2 / (1 - D~^2) d(D~); the median depth has D~ = 0, so about 4 % there and a little more around.
    assert 0.04 <= row.summary("abs_rel").mean < 0.05


def test_clips_that_can_not_be_coded_are_named() -> None:
    cameras = Scene(intrinsics=fov_to_intrinsics(torch.ones(3), (12, 16)))
    with pytest.raises(UserError, match="clip 1: expected rgb or depth"):
        evaluate_codec(OffsetCodec(), [clip(), cameras])
    with pytest.raises(UserError, match="at least one clip"):
        evaluate_codec(OffsetCodec(), [])
    with pytest.raises(UserError, match="finite"):
        evaluate_codec(OffsetCodec(rgb=math.nan), [clip()])
