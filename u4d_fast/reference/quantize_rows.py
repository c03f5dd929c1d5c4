"""Rows as e4m3 with a float32 scale each, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast.fp8 import Fp8Rows

LARGEST = 448.0
"""The largest number of e4m3."""

SMALLEST_SCALE = 2.0**-126
"""The smallest normal number of float32: below it the inverse of a scale overflows."""


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Specification of `u4d_fast.quantize_rows`: same arguments and results, any floating dtype."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    scale = scale.masked_fill(largest == 0, 1.0).masked_fill(largest.isinf(), torch.nan)
    return Fp8Rows((wide * (1 / scale)[..., None]).to(torch.float8_e4m3fn), scale)
