"""Materials and light of each scene."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.data.procedural.colours import hsv_to_linear
from u4d.data.procedural.randomness import UniformStream
from u4d.data.procedural.scene_layout import BOXES, FIXTURES, OBJECTS, SKY, Layout
from u4d.data.procedural.textures import (
    COLOUR_A,
    COLOUR_B,
    COLOUR_C,
    FREQUENCY,
    GRAIN,
    MOTTLE,
    PATTERN,
    sample_materials,
)

APPEARANCE_STREAM_LENGTH = 1100


@dataclass(frozen=True)
class Appearance:
    """How a batch looks: material [B,SURFACES,C]; light_position, light_colour, ambient, haze_colour [B,3];
    falloff, haze [B] (per squared unit and per unit of length); corner [B] how far corners stay dark, in units."""

    material: Tensor
    light_position: Tensor
    light_colour: Tensor
    falloff: Tensor
    ambient: Tensor
    haze_colour: Tensor
    haze: Tensor
    corner: Tensor


def sample_appearance(stream: UniformStream, layout: Layout) -> Appearance:
    """Draw materials and light for a layout, in its final units, float64."""
    walls = sample_materials(stream, 5, "wall")
    floor = sample_materials(stream, 1, "floor")
    things = sample_materials(stream, OBJECTS, "thing")
    pictures = sample_materials(stream, FIXTURES, "picture")
    indoor = layout.surroundings.indoor
    same_walls = stream.chance(0.7)[:, None, None]
    walls = torch.where(same_walls, torch.cat([walls[:, :1].expand(-1, 4, -1), walls[:, 4:]], dim=1), walls)
    fixtures = slice(BOXES - FIXTURES, BOXES)
    things[:, fixtures] = torch.where(indoor[:, None, None], pictures, things[:, fixtures])
    things[:, fixtures, FREQUENCY] *= torch.where(indoor, 1.0, 0.8)[:, None]
    sky = _sky_material(stream)
    faces = [walls[:, 0:1], walls[:, 1:2], walls[:, 4:5], floor, walls[:, 2:3], walls[:, 3:4], sky]
    material = torch.cat([*faces, things], dim=1)
    scale = layout.scale
    frequency = material[..., FREQUENCY] / scale[:, None]
    frequency[:, SKY] = material[:, SKY, FREQUENCY] / layout.surroundings.sky_radius
    material[..., FREQUENCY] = frequency
    return _with_light(stream, layout, material)


def _sky_material(stream: UniformStream) -> Tensor:
    sky = sample_materials(stream, 1, "wall", coarse=True)
    hue = stream.uniform(1, low=0.54, high=0.62)
    overcast = stream.chance(0.35, 1)
    saturation = torch.where(overcast, 0.06, stream.uniform(1, low=0.3, high=0.65))
    value = stream.uniform(1, low=0.7, high=0.95)
    cloud_value = torch.where(overcast, 0.72 * value, 0.97)
    sky[..., COLOUR_A : COLOUR_A + 3] = hsv_to_linear(hue, saturation, value)
    sky[..., COLOUR_B : COLOUR_B + 3] = hsv_to_linear(hue, torch.full_like(hue, 0.08), cloud_value)
    sky[..., COLOUR_C : COLOUR_C + 3] = hsv_to_linear(hue, 0.5 * saturation, value)
    sky[..., PATTERN] = 0.0
    sky[..., MOTTLE] = 0.3
    sky[..., GRAIN] = stream.uniform(1, low=0.02, high=0.12)
    sky[..., FREQUENCY] = stream.log_uniform(1, low=2.5, high=6.0)
    return sky


def _with_light(stream: UniformStream, layout: Layout, material: Tensor) -> Appearance:
    shell, scale = layout.surroundings, layout.scale[:, None]
    indoor = shell.indoor[:, None]
    share = stream.uniform(3)
    ceiling_share = 0.05 + 0.2 * share[:, 1]
    where = torch.stack([0.15 + 0.7 * share[:, 0], ceiling_share, 0.15 + 0.7 * share[:, 2]], dim=-1)
    lamp = shell.low + (shell.high - shell.low) * where
    azimuth = stream.uniform(high=2.0 * math.pi)
    elevation = torch.deg2rad(stream.uniform(low=22.0, high=75.0))
    sun = torch.stack([elevation.cos() * azimuth.sin(), -elevation.sin(), elevation.cos() * azimuth.cos()], dim=-1)
    position = torch.where(indoor, lamp, 40.0 * scale * sun)
    warmth = stream.uniform(low=-0.12, high=0.22)[:, None]
    tint = torch.cat([1.0 + warmth, 1.0 + 0.1 * warmth, 1.0 - warmth], dim=-1)
    span = (shell.high - shell.low).norm(dim=-1)
    falloff = torch.where(shell.indoor, stream.uniform(low=1.0, high=5.0) / span**2, 0.0)
    strength = torch.where(shell.indoor, stream.uniform(low=0.9, high=1.9), stream.uniform(low=0.6, high=1.4))
    ambient = stream.uniform(low=0.22, high=0.55)[:, None] * torch.where(
        indoor, torch.ones(3), 0.4 + 0.6 * tint.flip(-1)
    )
    haze_colour = 0.75 * material[:, SKY, COLOUR_A : COLOUR_A + 3] + 0.25 * material[:, SKY, COLOUR_B : COLOUR_B + 3]
    haze = torch.where(stream.chance(0.6), stream.log_uniform(low=0.004, high=0.05), 0.003) / layout.scale
    haze = torch.where(shell.indoor, 0.0, haze)
    corner = layout.scale * stream.log_uniform(low=0.08, high=0.4)
    return Appearance(material, position, strength[:, None] * tint, falloff, ambient, haze_colour, haze, corner)
