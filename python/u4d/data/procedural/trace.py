"""The ray tracer: exact intersections, one texture evaluation per ray, lambert light with hard shadows.

All objects are convex, so each is an interval of a ray and its near end is the hit. A ray is
`origin + t * direction` with `direction_camera = (x, y, 1)`: `t` is the depth along the optical axis itself.
Shadows reuse the same routine with rays that start at the light. Shapes are static: everything here runs under
torch.compile and on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from u4d.data.procedural.scene_layout import BOXES, CYLINDERS, SHELL, SKY, SPHERES
from u4d.data.procedural.textures import GLOSS, texture_colour

_FAR = 1.0e9
_NEAR = 1.0e-3
# columns of the geometry part of the surface table
ROTATION, CENTRE, HALF, SHAPE = 0, 9, 12, 15
GEOMETRY_COLUMNS = 16
SHAPE_BOX, SHAPE_SPHERE, SHAPE_CYLINDER = 0.0, 1.0, 2.0


class FrameTables(NamedTuple):
    """What the tracer needs to know about F frames, float32.

    lens [F,4] as (1/fx, 1/fy, cx, cy); camera_rotation [F,3,3]; camera_centre [F,3];
    room_low, room_high [F,3]; sky_centre [F,3]; sky_radius [F]; object_rotation [F,O,3,3] local-to-world;
    object_centre, object_half [F,O,3]; surface [F,SURFACES,GEOMETRY_COLUMNS + MATERIAL_COLUMNS];
    light_position, light_colour, ambient, haze_colour [F,3]; falloff, haze, corner [F].
    """

    lens: Tensor
    camera_rotation: Tensor
    camera_centre: Tensor
    room_low: Tensor
    room_high: Tensor
    sky_centre: Tensor
    sky_radius: Tensor
    object_rotation: Tensor
    object_centre: Tensor
    object_half: Tensor
    surface: Tensor
    light_position: Tensor
    light_colour: Tensor
    ambient: Tensor
    haze_colour: Tensor
    falloff: Tensor
    haze: Tensor
    corner: Tensor


Vector = tuple[Tensor, Tensor, Tensor]


def _components(rows: Tensor) -> Vector:
    """[F,3] -> three [F,1] columns that broadcast over rays."""
    return rows[:, 0:1], rows[:, 1:2], rows[:, 2:3]


def _three(component: Callable[[int], Tensor]) -> Vector:
    return component(0), component(1), component(2)


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _objects_along(tables: FrameTables, origin: Tensor, direction: Vector) -> tuple[Tensor, Tensor, Tensor]:
    """Near ends of the objects on rays from one point per frame, _FAR where missed.

    Returns [F,BOXES,P], [F,SPHERES,P], [F,CYLINDERS,P].
    """
    relative = origin[:, None] - tables.object_centre  # [F,O,3]
    local_origin = torch.einsum("foij,foi->foj", tables.object_rotation, relative)
    angular = torch.cat([tables.object_rotation[:, :BOXES], tables.object_rotation[:, BOXES + SPHERES :]], dim=1)
    turned = [
        angular[:, :, 0, j, None] * direction[0][:, None]
        + angular[:, :, 1, j, None] * direction[1][:, None]
        + angular[:, :, 2, j, None] * direction[2][:, None]
        for j in range(3)
    ]
    box = _box_entry(local_origin[:, :BOXES], tables.object_half[:, :BOXES], [d[:, :BOXES] for d in turned])
    ball = slice(BOXES, BOXES + SPHERES)
    sphere = _sphere_entry(relative[:, ball], tables.object_half[:, ball, 0], direction)
    last = slice(BOXES + SPHERES, None)
    cylinder = _cylinder_entry(local_origin[:, last], tables.object_half[:, last], [d[:, BOXES:] for d in turned])
    return box, sphere, cylinder


def _entry(near: Tensor, far: Tensor) -> Tensor:
    return torch.where((near < far) & (near > _NEAR), near, _FAR)


def _slab(origin: Tensor, half: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    inverse = torch.reciprocal(torch.where(direction.abs() < 1e-12, 1e-12, direction))
    middle = -origin[..., None] * inverse
    reach = half[..., None] * inverse.abs()
    return middle - reach, middle + reach


def _box_entry(origin: Tensor, half: Tensor, direction: list[Tensor]) -> Tensor:
    slabs = [_slab(origin[..., i], half[..., i], direction[i]) for i in range(3)]
    near = torch.maximum(torch.maximum(slabs[0][0], slabs[1][0]), slabs[2][0])
    far = torch.minimum(torch.minimum(slabs[0][1], slabs[1][1]), slabs[2][1])
    return _entry(near, far)


def _sphere_entry(relative: Tensor, radius: Tensor, direction: Vector) -> Tensor:
    d = [component[:, None] for component in direction]
    square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    middle = (
        -(relative[:, :, 0, None] * d[0] + relative[:, :, 1, None] * d[1] + relative[:, :, 2, None] * d[2]) / square
    )
    # the squared half chord from the perpendicular foot: no difference of large numbers
    foot = [relative[:, :, i, None] + middle * d[i] for i in range(3)]
    chord = (radius * radius)[..., None] - (foot[0] * foot[0] + foot[1] * foot[1] + foot[2] * foot[2])
    near = middle - torch.sqrt(chord.clamp_min(0.0) / square)
    return torch.where((chord > 0.0) & (near > _NEAR), near, _FAR)


def _cylinder_entry(origin: Tensor, half: Tensor, direction: list[Tensor]) -> Tensor:
    dx, dz = direction[0], direction[2]
    ox, oz = origin[:, :, 0, None], origin[:, :, 2, None]
    square = (dx * dx + dz * dz).clamp_min(1e-12)
    middle = -(ox * dx + oz * dz) / square
    cross = ox * dz - oz * dx
    chord = (half[:, :, 0] * half[:, :, 0])[..., None] * square - cross * cross
    reach = torch.sqrt(chord.clamp_min(0.0)) / square
    near, far = _slab(origin[..., 1], half[..., 1], direction[1])
    entry = _entry(torch.maximum(near, middle - reach), torch.minimum(far, middle + reach))
    return torch.where(chord > 0.0, entry, _FAR)


def _shell_along(tables: FrameTables, direction: Vector) -> tuple[Tensor, Tensor]:
    """Depth [F,P] and surface number [F,P] (float) of the surroundings behind everything else."""
    eye, low, high = (_components(x) for x in (tables.camera_centre, tables.room_low, tables.room_high))
    best = torch.full_like(direction[0], _FAR)
    surface = torch.zeros_like(best)
    for axis in range(3):
        d = torch.where(direction[axis].abs() < 1e-12, 1e-12, direction[axis])
        t = torch.where(d > 0.0, high[axis] - eye[axis], low[axis] - eye[axis]) / d
        surface = torch.where(t < best, torch.where(d > 0.0, 2.0 * axis + 1.0, 2.0 * axis), surface)
        best = torch.minimum(best, t)
    relative = _components(tables.camera_centre - tables.sky_centre)
    square = _dot(direction, direction)
    along = _dot(relative, direction) / square
    inside = tables.sky_radius[:, None] * tables.sky_radius[:, None] - _dot(relative, relative)
    sky = torch.sqrt(along * along + inside / square) - along
    return torch.minimum(best, sky), torch.where(sky < best, float(SKY), surface)


def trace_rays(u: Tensor, v: Tensor, tables: FrameTables, lattice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depth, surface number and linear colour of every ray.

    Args:
        u, v: [P] image positions in pixels (pixel centres at .5), the same for all frames.
        tables: F frames.
        lattice: `noise_lattice()`.
    Returns:
        depth [F,P] along the optical axis, surface [F,P] (0..5 walls, 6 sky, then objects), rgb [F,3,P] >= 0.
    """
    lens = tables.lens
    x = (u[None] - lens[:, 2:3]) * lens[:, 0:1]
    y = (v[None] - lens[:, 3:4]) * lens[:, 1:2]
    turn = tables.camera_rotation
    direction = _three(lambda i: turn[:, i, 0:1] * x + turn[:, i, 1:2] * y + turn[:, i, 2:3])
    depth, surface = _shell_along(tables, direction)
    entries = _objects_along(tables, tables.camera_centre, direction)
    first = SHELL
    for group, count in zip(entries, (BOXES, SPHERES, CYLINDERS), strict=True):
        for k in range(count):
            surface = torch.where(group[:, k] < depth, float(first + k), surface)
            depth = torch.minimum(depth, group[:, k])
        first += count
    colour = _shade(tables, direction, depth, surface, lattice)
    return depth, surface, colour


def _shade(tables: FrameTables, direction: Vector, depth: Tensor, surface: Tensor, lattice: Tensor) -> Tensor:
    frames, surfaces, columns = tables.surface.shape
    row = surface.long() + surfaces * torch.arange(frames, device=surface.device)[:, None]
    table = tables.surface.permute(2, 0, 1).reshape(columns, -1)
    found = [torch.take(table[column], row) for column in range(columns)]  # each [F,P]
    eye = _components(tables.camera_centre)
    point = _three(lambda i: eye[i] + depth * direction[i])
    offset = _three(lambda i: point[i] - found[CENTRE + i])
    local = _three(
        lambda j: (
            found[ROTATION + j] * offset[0] + found[ROTATION + 3 + j] * offset[1] + found[ROTATION + 6 + j] * offset[2]
        )
    )
    normal_local, across = _local_surface(local, found)
    normal = _three(
        lambda i: (
            found[ROTATION + 3 * i] * normal_local[0]
            + found[ROTATION + 3 * i + 1] * normal_local[1]
            + found[ROTATION + 3 * i + 2] * normal_local[2]
        )
    )
    square = _dot(direction, direction)
    length = torch.sqrt(square)
    slope = _dot(normal, direction) / length
    flip = torch.where(slope > 0.0, -1.0, 1.0)
    normal = (normal[0] * flip, normal[1] * flip, normal[2] * flip)
    cosine = slope.abs().clamp(0.06, 1.0)
    # geometric mean of the footprint's long and short side, leaning to the long one
    footprint = depth * tables.lens[:, 0:1] * cosine ** (-0.7)
    albedo = texture_colour(found[GEOMETRY_COLUMNS:], local, across, footprint, lattice)
    diffuse, specular = _light(tables, point, normal, direction, length, found[GEOMETRY_COLUMNS + GLOSS])

    is_sky = surface == float(SKY)
    climb = (-direction[1] / length).clamp_min(0.0)
    clear = torch.where(is_sky, 1.0 - torch.exp(-7.0 * climb), torch.exp(-tables.haze[:, None] * depth))
    ambient, lamp = _components(tables.ambient), _components(tables.light_colour)
    skyward = (0.8 - 0.3 * normal[1]) * _openness(tables, point, normal)
    channels = []
    for channel in range(3):
        lit = albedo[channel] * (ambient[channel] * skyward + diffuse * lamp[channel])
        value = torch.where(is_sky, albedo[channel], lit + specular)
        haze = tables.haze_colour[:, channel : channel + 1]
        channels.append((haze + (value - haze) * clear).clamp_min(0.0))
    return torch.stack(channels, dim=1)


def _openness(tables: FrameTables, point: Vector, normal: Vector) -> Tensor:
    """Share of ambient light [F,P] that reaches a point: corners and the foot of things on the floor are darker."""
    low, high = _components(tables.room_low), _components(tables.room_high)
    rate = -1.0 / tables.corner[:, None]
    result = torch.ones_like(point[0])
    for axis in range(3):
        for distance, facing in ((point[axis] - low[axis], normal[axis]), (high[axis] - point[axis], -normal[axis])):
            # a wall hides part of the half space of every surface but itself
            hidden = 0.5 * (1.0 - facing.clamp_min(0.0))
            result = result * (1.0 - hidden * torch.exp(rate * distance.clamp_min(0.0)))
    return result


def _local_surface(local: Vector, found: list[Tensor]) -> tuple[Vector, tuple[Tensor, Tensor]]:
    """Unit normal in the surface's own axes and two coordinates along the surface."""
    shape = found[SHAPE]
    q = _three(lambda i: local[i] / found[HALF + i])
    a = _three(lambda i: q[i].abs())
    radial = torch.sqrt(q[0] * q[0] + q[2] * q[2])
    is_box, is_ball = shape == SHAPE_BOX, shape == SHAPE_SPHERE
    face_x = is_box & (a[0] >= a[1]) & (a[0] >= a[2])
    face_y = (is_box & ~face_x & (a[1] >= a[2])) | ((shape == SHAPE_CYLINDER) & (a[1] >= radial))
    face_z = is_box & ~face_x & ~face_y
    curved = ~(face_x | face_y | face_z)
    zero, one = torch.zeros_like(shape), torch.ones_like(shape)
    normal = (
        torch.where(curved, q[0], torch.where(face_x, one, zero)),
        torch.where(curved, torch.where(is_ball, q[1], zero), torch.where(face_y, one, zero)),
        torch.where(curved, q[2], torch.where(face_z, one, zero)),
    )
    around = torch.atan2(q[0], q[2]) * found[HALF]
    u = torch.where(curved, around, torch.where(face_x, local[2], local[0]))
    v = torch.where(face_y, local[2], local[1])
    return normal, (u, v)


def _light(
    tables: FrameTables, point: Vector, normal: Vector, direction: Vector, length: Tensor, gloss: Tensor
) -> tuple[Tensor, Tensor]:
    """Diffuse and specular light [F,P] of the lamp or sun, after shadows."""
    lamp = _components(tables.light_position)
    ray = _three(lambda i: point[i] - lamp[i])
    blockers = _objects_along(tables, tables.light_position, ray)
    nearest = torch.minimum(torch.minimum(blockers[0].amin(1), blockers[1].amin(1)), blockers[2].amin(1))
    visible = torch.where(nearest < 0.9985, 0.0, 1.0)
    square = _dot(ray, ray)
    distance = torch.sqrt(square)
    incidence = (-_dot(normal, ray) / distance).clamp_min(0.0)
    strength = visible / (1.0 + tables.falloff[:, None] * square)
    half = _three(lambda i: ray[i] / distance + direction[i] / length)
    facing = _dot(normal, half).abs() / torch.sqrt(_dot(half, half) + 1e-9)
    shine = facing * facing
    shine = shine * shine
    shine = shine * shine
    shine = shine * shine * shine * shine
    return incidence * strength, 0.5 * gloss * shine * strength
