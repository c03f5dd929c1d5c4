"""Depth as colour: near is warm, far is cool, the same colour means the same depth all through a clip."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from u4d.geometry.depth import valid_depth

COLOUR_MAP = "Spectral"  # red - yellow - blue, light in the middle; 0 is far after the flip below
INVALID_COLOUR = (38, 38, 44)
MAX_SAMPLES = 250_000  # quantiles of more pixels than this differ by nothing that can be seen


def disparity_range(depth: Tensor) -> tuple[float, float]:
    """Smallest and largest disparity (1/depth) worth a colour of its own.

    Args:
        depth: [..., H, W]; invalid pixels are 0.
    Returns:
        The 2 % and 98 % quantiles over the whole clip, so that single wild pixels do not decide; (0, 1) where no
        pixel is valid.
    """
    valid = depth[valid_depth(depth)]
    if valid.numel() == 0:
        return 0.0, 1.0
    disparity = 1 / valid[:: max(1, valid.numel() // MAX_SAMPLES)].float()
    ordered = disparity.sort().values
    low, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in (0.02, 0.98))
    return (low, high) if high > low * (1 + 1e-6) else (low * 0.5, low * 1.5)


def colour_depth(depth: Tensor, shown: tuple[float, float]) -> np.ndarray:
    """Colour one depth map or many.

    Args:
        depth: [..., H, W]; invalid pixels are 0.
        shown: disparities at the far and the near end of the colours, from `disparity_range`.
    Returns:
        [..., H, W, 3] uint8; invalid pixels are dark grey.
    """
    valid = valid_depth(depth)
    disparity = 1 / torch.where(valid, depth, torch.ones_like(depth)).float()
    place = ((disparity - shown[0]) / (shown[1] - shown[0])).clamp(0, 1)
    table = torch.from_numpy(_table())
    colours = table[(place * (len(table) - 1)).round().long().cpu()]
    colours[~valid.cpu()] = torch.tensor(INVALID_COLOUR, dtype=torch.uint8)
    return np.asarray(colours.numpy())


@cache
def _table() -> np.ndarray:
    """[256,3] uint8, far to near."""
    import matplotlib

    steps = np.linspace(0.98, 0.02, 256)
    return (matplotlib.colormaps[COLOUR_MAP](steps)[:, :3] * 255).round().astype(np.uint8)
