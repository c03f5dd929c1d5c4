"""Procedural textures: one band-limited formula that every surface runs with its own parameters.

All patterns are computed for all pixels and one is selected: branches do not vectorise, and the winning
surface is known by then, so this runs once per ray. Lengths are in pattern periods ("cells"); `footprint` is
the size of a pixel in cells and fades whatever is too fine to be drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u4d.data.procedural.colours import sample_colours
from u4d.data.procedural.randomness import UniformStream

PATTERNS = ("cloud", "checker", "stripes", "brick", "marble", "gradient", "speckle")
_PATTERN_WEIGHTS = {
    "thing": (0.22, 0.13, 0.13, 0.13, 0.14, 0.08, 0.17),
    "floor": (0.22, 0.14, 0.04, 0.36, 0.14, 0.0, 0.10),
    "wall": (0.24, 0.06, 0.16, 0.22, 0.08, 0.10, 0.14),
    "picture": (0.20, 0.20, 0.15, 0.05, 0.20, 0.05, 0.15),
}
# columns of the material table
COLOUR_A, COLOUR_B, COLOUR_C, OFFSET = 0, 3, 6, 9
PATTERN, FREQUENCY, WARP, MOTTLE, GRAIN = 12, 13, 14, 15, 16
STRIPE_COS, STRIPE_SIN, BRICK_ASPECT, CLOUD_GAIN, GLOSS = 17, 18, 19, 20, 21
MATERIAL_COLUMNS = 22

_LATTICE = 16  # cells until the noise repeats
_OCTAVE_SCALE = (1.0, 2.63, 6.9, 17.3)
_OCTAVE_WEIGHT = (0.44, 0.30, 0.20, 0.14)


def noise_lattice(device: torch.device | str = "cpu") -> Tensor:
    """Random values at the eight corners of each cell of a periodic lattice, [8, 16^3] in [-1, 1]."""
    generator = torch.Generator().manual_seed(20261122)
    values = 2.0 * torch.rand(_LATTICE, _LATTICE, _LATTICE, generator=generator, dtype=torch.float64) - 1.0
    corners = [torch.roll(values, (-dz, -dy, -dx), (0, 1, 2)) for dz in (0, 1) for dy in (0, 1) for dx in (0, 1)]
    return torch.stack([corner.reshape(-1) for corner in corners]).to(device=device, dtype=torch.float32)


def sample_materials(stream: UniformStream, count: int, role: str, coarse: bool = False) -> Tensor:
    """Random material table [B, count, MATERIAL_COLUMNS] for things, floors, walls or pictures.

    Frequencies are in cells per typical depth; `coarse` is for far backgrounds.
    """
    vividness = {"thing": 1.15, "floor": 0.7, "wall": 0.7, "picture": 1.4}[role]
    first, second, accent = sample_colours(stream, count, vividness)
    offset = stream.uniform(count, 3, high=float(_LATTICE))
    pattern = stream.choice(_PATTERN_WEIGHTS[role], count)
    low, high = (0.15, 0.5) if coarse else (2.5, 12.0)
    if role == "picture":
        low, high = 4.0, 14.0
    frequency = stream.log_uniform(count, low=low, high=high)
    gradient = pattern == PATTERNS.index("gradient")
    frequency = torch.where(gradient, 0.35 * frequency, frequency)
    warp = stream.uniform(count) ** 2 * 0.5
    warp = torch.where(pattern == PATTERNS.index("marble"), 1.0 + 2.5 * stream.uniform(count), warp)
    warp = torch.where(pattern == PATTERNS.index("brick"), 0.04 * warp, warp)
    warp = torch.where(pattern == PATTERNS.index("checker"), 0.12 * warp, warp)
    mottle = stream.uniform(count) ** 1.5 * 0.8
    mottle = torch.where(gradient, 0.5 + 0.4 * mottle, mottle)
    grain = stream.uniform(count, low=0.12, high=0.55)
    angle = torch.where(stream.chance(0.5, count), 0.0, 1.0) * stream.uniform(count, high=torch.pi)
    aspect = torch.where(stream.chance(0.35, count), stream.log_uniform(count, low=4.0, high=10.0), 1.0)  # planks
    aspect = torch.where(stream.chance(0.5, count), aspect, stream.log_uniform(count, low=1.0, high=3.0))
    cloud_gain = stream.log_uniform(count, low=1.5, high=6.0)
    gloss = torch.where(stream.chance(0.3, count), stream.uniform(count, low=0.1, high=0.6), 0.0)
    columns = (pattern, frequency, warp, mottle, grain, angle.cos(), angle.sin(), aspect, cloud_gain, gloss)
    return torch.cat([first, second, accent, offset, *(c.to(torch.float64)[..., None] for c in columns)], dim=-1)


def noise_octaves(x: Tensor, y: Tensor, z: Tensor, footprint: Tensor, lattice: Tensor) -> list[Tensor]:
    """Value noise in [-1, 1] at four scales, each faded out where its cells shrink to a pixel.

    Args:
        x, y, z: positions in cells, any one shape.
        footprint: pixel size in cells, same shape.
        lattice: `noise_lattice()`.
    """
    result = []
    for octave, scale in enumerate(_OCTAVE_SCALE):
        # each octave looks in another direction, so that their lattices never line up
        if octave == 0:
            px, py, pz = x, y, z
        elif octave == 1:
            px, py, pz = 0.8 * x + 0.6 * z, y + 0.31 * x, 0.8 * z - 0.6 * x
        elif octave == 2:
            px, py, pz = 0.8 * x - 0.6 * y, 0.8 * y + 0.6 * x, z + 0.27 * y
        else:
            px, py, pz = x + 0.29 * z, 0.6 * y + 0.8 * z, 0.6 * z - 0.8 * y
        fade = (1.8 - (1.3 * scale) * footprint).clamp(0.0, 1.0)
        result.append(_value_noise(px * scale, py * scale, pz * scale, lattice) * fade)
    return result


def _value_noise(x: Tensor, y: Tensor, z: Tensor, lattice: Tensor) -> Tensor:
    fx, fy, fz = torch.floor(x), torch.floor(y), torch.floor(z)
    index = (fx.int() & 15) | ((fy.int() & 15) << 4) | ((fz.int() & 15) << 8)
    x, y, z = _smooth(x - fx), _smooth(y - fy), _smooth(z - fz)
    corner = [torch.take(lattice[k], index.long()) for k in range(8)]
    near = torch.lerp(torch.lerp(corner[0], corner[1], x), torch.lerp(corner[2], corner[3], x), y)
    far = torch.lerp(torch.lerp(corner[4], corner[5], x), torch.lerp(corner[6], corner[7], x), y)
    return torch.lerp(near, far, z)


def _smooth(t: Tensor) -> Tensor:
    return t * t * (3.0 - 2.0 * t)


def _square(x: Tensor, footprint: Tensor) -> Tensor:
    """Square wave of period 1 in [-1, 1], edges a pixel wide, faded to 0 towards two pixels per period."""
    triangle = 4.0 * torch.abs(x - torch.floor(x) - 0.5) - 1.0
    return (triangle / (2.0 * footprint + 0.03)).clamp(-1.0, 1.0) * (1.7 - 3.0 * footprint).clamp(0.0, 1.0)


def texture_colour(
    material: list[Tensor],
    solid: tuple[Tensor, Tensor, Tensor],
    surface: tuple[Tensor, Tensor],
    footprint: Tensor,
    lattice: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear RGB of each ray's hit.

    Args:
        material: MATERIAL_COLUMNS tensors [...rays], one per parameter.
        solid: position on the surface in its own axes, three tensors [...rays].
        surface: two surface coordinates (metres along the surface), two tensors [...rays].
        footprint: size of a pixel on the surface, [...rays].
        lattice: `noise_lattice()`.
    """
    frequency, warp = material[FREQUENCY], material[WARP]
    x = solid[0] * frequency + material[OFFSET]
    y = solid[1] * frequency + material[OFFSET + 1]
    z = solid[2] * frequency + material[OFFSET + 2]
    cell = footprint * frequency
    coarse, middle, fine, finest = noise_octaves(x, y, z, cell, lattice)
    weight = _OCTAVE_WEIGHT
    cloud = weight[0] * coarse + weight[1] * middle + weight[2] * fine + weight[3] * finest

    u = surface[0] * frequency + material[OFFSET] + warp * 0.5 * coarse
    v = surface[1] * frequency + material[OFFSET + 1] + warp * 0.5 * middle
    along = u * material[STRIPE_COS] + v * material[STRIPE_SIN]
    half_u = _square(0.5 * u, 0.5 * cell)
    half_v = _square(0.5 * v, 0.5 * cell)
    checker = half_u * half_v
    stripes = _square(along, cell)
    brick = _brick(u, v, material[BRICK_ASPECT], cell, lattice)
    marble = torch.sin(6.2831853 * along + 2.0 * warp * cloud) * (1.7 - 3.0 * cell).clamp(0.0, 1.0)
    gradient = 2.0 * torch.abs(0.5 * along - torch.floor(0.5 * along) - 0.5) * 2.0 - 1.0
    speckle = ((middle + 0.5 * fine + 0.3 * finest - 0.25) * 6.0).clamp(-1.0, 1.0)

    kind = material[PATTERN]
    value = (cloud * material[CLOUD_GAIN]).clamp(-1.0, 1.0)
    for number, pattern in enumerate((checker, stripes, brick, marble, gradient, speckle), start=1):
        value = torch.where(kind == number, pattern, value)
    blend = 0.5 + 0.5 * value
    accent = material[MOTTLE] * (2.2 * (0.7 * coarse + 0.5 * middle + 0.3 * fine) - 0.1).clamp(0.0, 1.0)
    grain = 1.0 + material[GRAIN] * (0.5 * middle + 0.9 * fine + 0.9 * finest)
    channels = []
    for channel in range(3):
        base = torch.lerp(material[COLOUR_A + channel], material[COLOUR_B + channel], blend)
        channels.append(torch.lerp(base, material[COLOUR_C + channel], accent) * grain)
    return channels[0], channels[1], channels[2]


def _brick(u: Tensor, v: Tensor, aspect: Tensor, cell: Tensor, lattice: Tensor) -> Tensor:
    """Bricks, tiles or planks in [-1, 1]: mortar at +1, each brick its own shade below."""
    row = torch.floor(v)
    across = u / aspect + 0.37 * row
    column = torch.floor(across)
    index = (column.int() & 15) | ((row.int() & 15) << 4)
    shade = torch.take(lattice[0], index.long())
    du = (0.5 - torch.abs(across - column - 0.5)) * aspect
    dv = 0.5 - torch.abs(v - row - 0.5)
    mortar = (0.5 + (0.07 - torch.minimum(du, dv)) / (cell + 0.02)).clamp(0.0, 1.0)
    fade = (1.7 - 2.0 * cell).clamp(0.0, 1.0)
    mortar = torch.lerp(torch.full_like(mortar, 0.25), mortar, fade)
    return torch.lerp(-0.6 + 0.4 * fade * shade, torch.ones_like(mortar), mortar)
