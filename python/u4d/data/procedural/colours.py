"""Natural colours: mostly muted earth, wood, plaster, foliage and stone hues, with some saturated paint."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d.data.procedural.randomness import UniformStream

DISPLAY_GAMMA = 2.2
# (hue centre in turns, spread, weight): wood and brick, ochre, foliage, sky and cloth blue, anything
_HUES = ((0.065, 0.025, 0.34), (0.12, 0.03, 0.16), (0.28, 0.06, 0.15), (0.58, 0.05, 0.15), (0.5, 0.5, 0.20))


def hsv_to_linear(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Display-referred HSV in [0,1] (hue in turns) to linear RGB [..., 3]."""
    sector = hue.remainder(1.0)[..., None] * 6.0
    shift = torch.tensor([5.0, 3.0, 1.0], dtype=hue.dtype)
    ramp = (shift + sector).remainder(6.0)
    chroma = torch.minimum(ramp, 4.0 - ramp).clamp(0.0, 1.0)
    return (value[..., None] * (1.0 - saturation[..., None] * chroma)) ** DISPLAY_GAMMA


def sample_colours(stream: UniformStream, count: int, vividness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Three related colours per surface, each [B,count,3] linear RGB.

    The second is a darker or lighter relative of the first (in a third of the cases an unrelated colour), the
    third an accent. `vividness` scales saturation: walls are calmer than things.
    """
    family = stream.choice([weight for _, _, weight in _HUES], count)
    table = torch.tensor(_HUES, dtype=torch.float64)
    hue = table[family, 0] + table[family, 1] * stream.uniform(count, low=-1.0, high=1.0)
    sort = stream.choice((0.62, 0.26, 0.12), count)
    low = torch.tensor([0.02, 0.25, 0.6], dtype=torch.float64)[sort]
    high = torch.tensor([0.30, 0.60, 0.95], dtype=torch.float64)[sort]
    saturation = (vividness * (low + (high - low) * stream.uniform(count))).clamp(0.0, 0.95)
    value = 0.15 + 0.8 * stream.uniform(count) ** 0.8

    step = stream.uniform(count, low=0.18, high=0.5)
    step = torch.where(value > 0.55, -step, step)  # towards mid-grey: contrast that survives exposure
    related = (hue + 0.03 * stream.normal(count), (saturation * stream.uniform(count, low=0.5, high=1.4)), value + step)
    free = (stream.uniform(count), saturation * stream.uniform(count, low=0.3, high=1.5), value + 0.6 * step)
    unrelated = stream.chance(0.33, count)
    second = [torch.where(unrelated, f, r) for f, r in zip(free, related, strict=True)]
    accent_hue = hue + torch.where(stream.chance(0.5, count), 0.05, 0.45) * stream.normal(count)
    accent_value = (value + stream.uniform(count, low=-0.45, high=0.45)).clamp(0.08, 0.97)
    return (
        hsv_to_linear(hue, saturation, value),
        hsv_to_linear(second[0], second[1].clamp(0.0, 0.95), second[2].clamp(0.06, 0.98)),
        hsv_to_linear(accent_hue, saturation.clamp(0.05, 0.9), accent_value),
    )
