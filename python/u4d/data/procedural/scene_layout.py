"""Random scenes as padded tensors: a room or open ground, boxes, spheres and cylinders, some of them moving.

World: y points down, walls and ground are axis-aligned, the first camera stands near the origin with a random
yaw. Everything is laid out with the scene's typical depth as unit of length and scaled at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.data.procedural.camera_paths import (
    OVERSHOOT,
    PERIOD,
    Lens,
    PathParameters,
    path_parameter,
    path_poses,
    sample_lens,
    sample_path,
)
from u4d.data.procedural.randomness import UniformStream
from u4d.data.procedural.rotations import axis_angle_matrix, yaw_matrix

BOXES, SPHERES, CYLINDERS = 7, 4, 4
OBJECTS = BOXES + SPHERES + CYLINDERS
FIXTURES = 2  # the last boxes: pictures and doors on walls, or buildings outdoors
SHELL = 7  # surfaces of the surroundings: -x, +x, ceiling, floor, -z, +z, sky
SKY = 6
SURFACES = SHELL + OBJECTS
MAX_DEPTH = 60.0
OPEN = 1.0e6  # a wall that is not there
_HIDDEN = (0.0, 3.0e3, 0.0)  # below every floor: where unused objects wait
_CANDIDATES = 6
_CHECKS = 9  # points of path and motion tested for collisions
LAYOUT_STREAM_LENGTH = 1400


@dataclass(frozen=True)
class Surroundings:
    """The shell of a scene: indoor [B]; low, high [B,3] room limits; sky_radius [B], around the first camera."""

    indoor: Tensor
    low: Tensor
    high: Tensor
    sky_radius: Tensor


@dataclass(frozen=True)
class Objects:
    """Poses and sizes: rotation [B,N,O,3,3] local-to-world, centre [B,N,O,3], half [B,O,3], moving [B,O], active [B,O].

    Order: boxes (half sizes), spheres (radius three times), cylinders (radius, half height, radius; axis y).
    """

    rotation: Tensor
    centre: Tensor
    half: Tensor
    moving: Tensor
    active: Tensor


@dataclass(frozen=True)
class Layout:
    """Everything geometric about a batch of clips, float64, in final units."""

    surroundings: Surroundings
    objects: Objects
    lens: Lens
    path: PathParameters
    camera_rotation: Tensor  # [B,N,3,3]
    camera_centre: Tensor  # [B,N,3]
    scale: Tensor  # [B] typical depth in final units


def sample_layout(layout_stream: UniformStream, path_stream: UniformStream, frames: int) -> Layout:
    """Draw the geometry of a batch of clips of `frames` frames."""
    lens = sample_lens(path_stream, frames)
    indoor = layout_stream.chance(0.62)
    bend = layout_stream.normal()
    pitch0 = torch.where(indoor, (8.0 * bend - 5.0).clamp(-35.0, 25.0), (7.0 * bend - 15.0).clamp(-38.0, -8.0))
    pitch0 = torch.deg2rad(pitch0)  # outdoors a little down, so that the sky never fills the picture
    yaw0 = layout_stream.uniform(low=-math.pi, high=math.pi)
    path = sample_path(path_stream, pitch0, yaw0)
    surroundings = _sample_surroundings(layout_stream, indoor, path, lens)

    checks = torch.linspace(-OVERSHOOT, 1.0 + OVERSHOOT, _CHECKS, dtype=torch.float64) * PERIOD
    eyes = _extended_poses(path, checks)
    surroundings = _enclose_path(surroundings, eyes)
    objects = _sample_objects(layout_stream, surroundings, path, lens, eyes, frames)
    rotation, centre = path_poses(path, torch.arange(frames, dtype=torch.float64))

    scale = torch.exp(math.log(3.2) + 0.7 * layout_stream.normal()).clamp(0.95, 11.0)
    sky_radius = torch.minimum(surroundings.sky_radius * scale, torch.tensor(0.92 * MAX_DEPTH, dtype=torch.float64))
    sky_radius = torch.where(indoor, OPEN, sky_radius)
    return Layout(
        surroundings=Surroundings(
            indoor, surroundings.low * scale[:, None], surroundings.high * scale[:, None], sky_radius
        ),
        objects=Objects(
            objects.rotation,
            objects.centre * scale[:, None, None, None],
            objects.half * scale[:, None, None],
            objects.moving,
            objects.active,
        ),
        lens=lens,
        path=path,
        camera_rotation=rotation,
        camera_centre=centre * scale[:, None, None],
        scale=scale,
    )


def _extended_poses(path: PathParameters, frame: Tensor) -> Tensor:
    """Camera centres [B,C,3] over the whole stretch that clips of any length stay on."""
    inside = frame.clamp(0.0, PERIOD)
    _, centre = path_poses(path, inside)
    before, after = frame < 0.0, frame > PERIOD
    _, ends = path_poses(path, torch.tensor([0.0, 0.5, PERIOD - 0.5, PERIOD], dtype=torch.float64))
    backward = (ends[:, 0] - ends[:, 1])[:, None] * (2.0 * (inside - frame).abs())[None, :, None]
    forward = (ends[:, 3] - ends[:, 2])[:, None] * (2.0 * (inside - frame).abs())[None, :, None]
    return centre + torch.where(before[None, :, None], backward, torch.where(after[None, :, None], forward, 0.0))


def _sample_surroundings(stream: UniformStream, indoor: Tensor, path: PathParameters, lens: Lens) -> Surroundings:
    """Walls in metres of a person's world, then divided by the typical depth that the first camera sees."""
    heading = torch.stack([-path.yaw0.sin(), path.yaw0.sin(), -path.yaw0.cos(), path.yaw0.cos()], dim=-1)
    reach = stream.log_uniform(4, low=1.0, high=4.5) * (1.0 + 0.8 * heading.clamp_min(0.0))  # -x, +x, -z, +z
    eye_height = torch.where(indoor, stream.uniform(low=0.7, high=1.8), stream.log_uniform(low=0.8, high=3.2))
    ceiling = stream.uniform(low=0.6, high=2.0)
    low = torch.stack([-reach[:, 0], -ceiling, -reach[:, 2]], dim=-1)
    high = torch.stack([reach[:, 1], eye_height, reach[:, 3]], dim=-1)
    outside_high = torch.stack([torch.full_like(eye_height, OPEN), eye_height, torch.full_like(eye_height, OPEN)], -1)
    low = torch.where(indoor[:, None], low, torch.full_like(low, -OPEN))
    high = torch.where(indoor[:, None], high, outside_high)

    rotation, _ = path_poses(path, torch.zeros(1, dtype=torch.float64))
    spread = torch.tan(lens.fov_x_rad[:, :1] / 2.0)
    across = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    down = torch.linspace(-0.65, 0.65, 5, dtype=torch.float64)
    grid = torch.cartesian_prod(down, across)  # [35,2] as (v, u)
    local = torch.stack([grid[:, 1] * spread, grid[:, 0] * spread, torch.ones_like(spread).expand(-1, 35)], dim=-1)
    direction = torch.einsum("bij,bpj->bpi", rotation[:, 0], local)
    exit_plane = torch.where(direction > 0, high[:, None], low[:, None])
    depth = (exit_plane / torch.where(direction.abs() < 1e-9, 1e-9, direction)).amin(-1).clamp(max=9.0)
    typical = (0.78 * depth.median(dim=-1).values).clamp(0.6, 7.0)
    sky_radius = stream.log_uniform(low=14.0, high=45.0)
    return Surroundings(indoor, low / typical[:, None], high / typical[:, None], sky_radius)


def _enclose_path(surroundings: Surroundings, eyes: Tensor) -> Surroundings:
    """Push walls outwards so that no camera comes closer to them than a fifth of the typical depth."""
    margin = 0.2
    low = torch.minimum(surroundings.low, eyes.amin(1) - margin)
    high = torch.maximum(surroundings.high, eyes.amax(1) + margin)
    return Surroundings(surroundings.indoor, low, high, surroundings.sky_radius)


@dataclass(frozen=True)
class _Motion:
    """Object motion relative to its base pose; everything [B,O,...]."""

    drift: Tensor
    swing: Tensor
    swing_cycles: Tensor
    swing_phase: Tensor
    spin_axis: Tensor
    spin: Tensor

    def at(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Displacement [B,T,O,3] and turn [B,T,O,3,3] at `time` [T] (1 = 17 frames)."""
        e = path_parameter(time * PERIOD)[:, None, None]
        wave = torch.sin(2.0 * math.pi * self.swing_cycles[:, None] * time[:, None] + self.swing_phase[:, None])
        shift = self.drift[:, None] * (e - 0.5) + self.swing[:, None] * wave[..., None]
        angle = self.spin[:, None] * time[:, None]
        return shift, axis_angle_matrix(self.spin_axis[:, None].expand(-1, len(time), -1, -1), angle)


def _sample_objects(
    stream: UniformStream, shell: Surroundings, path: PathParameters, lens: Lens, eyes: Tensor, frames: int
) -> Objects:
    distance, half, base = _sample_shapes(stream)
    upright = stream.chance(0.72, OBJECTS)
    yaw_only = yaw_matrix(stream.uniform(OBJECTS, high=2.0 * math.pi))
    tumbled = axis_angle_matrix(stream.unit_vectors(OBJECTS), stream.uniform(OBJECTS, high=math.pi))
    rotation = torch.where(upright[..., None, None], yaw_only, tumbled)
    rotation[:, BOXES - FIXTURES : BOXES] = torch.eye(3, dtype=torch.float64)
    motion, moving = _sample_motion(stream, distance, upright)

    places = _sample_places(stream, shell, path, lens, distance, half, upright, rotation)
    fixtures, fixture_half = _sample_fixtures(stream, shell, path, lens)
    places[:, BOXES - FIXTURES : BOXES] = fixtures
    half[:, BOXES - FIXTURES : BOXES] = fixture_half

    clearance = _clearance(places, half, rotation, motion, moving, eyes)  # [B,O,K]
    free = clearance > 0.16
    chosen = free.to(torch.int64).argmax(-1)
    place = torch.gather(places, 2, chosen[..., None, None].expand(-1, -1, 1, 3))[:, :, 0]
    active = base & free.any(-1)
    hidden = torch.tensor(_HIDDEN, dtype=torch.float64)
    time = torch.arange(frames, dtype=torch.float64) / PERIOD
    shift, turn = motion.at(time)
    centre = place[:, None] + torch.where((moving & active)[:, None, :, None], shift, 0.0)
    centre = torch.where(active[:, None, :, None], centre, hidden)
    turned = torch.where((moving & active)[:, None, :, None, None], turn @ rotation[:, None], rotation[:, None])
    return Objects(turned, centre, half, moving & active, active)


def _sample_shapes(stream: UniformStream) -> tuple[Tensor, Tensor, Tensor]:
    """Distances [B,O] from the first camera, half sizes [B,O,3] and which objects exist [B,O]."""
    distance = stream.log_uniform(OBJECTS, low=0.42, high=1.7)
    size = distance * stream.log_uniform(OBJECTS, low=0.07, high=0.30)
    boxes = size[:, :BOXES, None] * stream.log_uniform(BOXES, 3, low=0.4, high=1.35)
    spheres = 0.8 * size[:, BOXES : BOXES + SPHERES, None].expand(-1, -1, 3)
    round_size = size[:, BOXES + SPHERES :]
    radius = round_size * stream.log_uniform(CYLINDERS, low=0.3, high=0.9)
    height = round_size * stream.log_uniform(CYLINDERS, low=0.4, high=2.2)
    half = torch.cat([boxes, spheres, torch.stack([radius, height, radius], dim=-1)], dim=1).clone()
    slots = torch.tensor(
        [*range(BOXES - FIXTURES), *range(FIXTURES), *range(SPHERES), *range(CYLINDERS)], dtype=torch.float64
    )
    counts = [stream.uniform(low=1.6, high=5.99), stream.uniform(high=2.99)]
    counts += [4.99 * stream.uniform() ** 1.3, 4.99 * stream.uniform() ** 1.3]
    limits = torch.stack(counts, dim=-1).floor()
    limits = limits.repeat_interleave(torch.tensor([BOXES - FIXTURES, FIXTURES, SPHERES, CYLINDERS]), dim=1)
    return distance, half, slots < limits


def _sample_motion(stream: UniformStream, distance: Tensor, upright: Tensor) -> tuple[_Motion, Tensor]:
    dynamic = stream.chance(0.38)
    moving = dynamic[:, None] & stream.chance(0.45, OBJECTS)
    moving[:, 0] |= dynamic
    moving[:, BOXES - FIXTURES : BOXES] = False
    direction = stream.unit_vectors(OBJECTS)
    vertical = torch.where(upright, 0.0, 0.7)[..., None] * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    direction = direction * (torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) + vertical)
    step = distance * stream.log_uniform(OBJECTS, low=0.12, high=0.6)
    kind = stream.choice((0.5, 0.3, 0.2), OBJECTS)  # drift, swing, spin only
    spins = (kind == 2) | stream.chance(0.35, OBJECTS)
    axis = torch.where(stream.chance(0.75, OBJECTS)[..., None], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), 0.0)
    tumble = stream.unit_vectors(OBJECTS)
    axis = torch.where((axis.sum(-1, keepdim=True) == 0.0), tumble, axis)
    angle = stream.uniform(OBJECTS, low=0.3, high=2.2) * torch.where(stream.chance(0.5, OBJECTS), 1.0, -1.0)
    motion = _Motion(
        drift=direction * (step * (kind == 0))[..., None],
        swing=direction * (0.4 * step * (kind == 1))[..., None],
        swing_cycles=stream.log_uniform(OBJECTS, low=0.4, high=1.4),
        swing_phase=stream.uniform(OBJECTS, high=2.0 * math.pi),
        spin_axis=axis,
        spin=angle * spins,
    )
    return motion, moving


def _sample_places(
    stream: UniformStream,
    shell: Surroundings,
    path: PathParameters,
    lens: Lens,
    distance: Tensor,
    half: Tensor,
    upright: Tensor,
    rotation: Tensor,
) -> Tensor:
    """Candidate centres [B,O,K,3]: in front of the path's middle view, on the floor or in the air, inside the walls."""
    spread = 0.62 * lens.fov_x_rad[:, :1, None]
    turn = path.turn[:, None, None] * stream.uniform(OBJECTS, _CANDIDATES)
    bearing = path.yaw0[:, None, None] + turn + spread * stream.uniform(OBJECTS, _CANDIDATES, low=-1.0, high=1.0)
    far = distance[..., None] * stream.uniform(OBJECTS, _CANDIDATES, low=0.85, high=1.25)
    floor = shell.high[:, 1, None, None]
    extent = (rotation.abs() @ half[..., None])[..., 0]  # half sizes of the axis-aligned bound, world axes
    low = shell.low[:, None, None] + 0.8 * extent[:, :, None]
    high = shell.high[:, None, None] - 0.8 * extent[:, :, None]
    x = far * torch.sin(bearing)
    z = far * torch.cos(bearing)
    grounded = floor - extent[..., 1, None]
    sight = -torch.tan(path.pitch0)[:, None, None] * far
    floating = sight + far * stream.uniform(OBJECTS, _CANDIDATES, low=-0.32, high=0.32)
    floating = torch.minimum(floating, grounded)
    y = torch.where(upright[..., None], grounded, floating)
    place = torch.stack([x, y, z], dim=-1)
    return torch.maximum(torch.minimum(place, torch.maximum(low, high)), torch.minimum(low, high)).clone()


def _sample_fixtures(
    stream: UniformStream, shell: Surroundings, path: PathParameters, lens: Lens
) -> tuple[Tensor, Tensor]:
    """Boxes [B,FIXTURES,K,3] flat on the wall that a bearing meets (indoors), or far and big (outdoors)."""
    spread = 0.5 * lens.fov_x_rad[:, :1, None]
    bearing = path.yaw0[:, None, None] + spread * stream.uniform(FIXTURES, _CANDIDATES, low=-1.0, high=1.0)
    bearing = bearing[..., :1].expand(-1, -1, _CANDIDATES)  # one wall per fixture: its thickness belongs to it
    direction = torch.stack([torch.sin(bearing), torch.cos(bearing)], dim=-1)
    limits = torch.where(direction > 0, shell.high[:, None, None, [0, 2]], shell.low[:, None, None, [0, 2]])
    hit = limits / torch.where(direction.abs() < 1e-6, 1e-6, direction)
    facing = hit.argmin(-1, keepdim=True)  # 0: the wall is across x, 1: across z
    spot = direction * hit.amin(-1, keepdim=True)
    size = stream.log_uniform(FIXTURES, 2, low=0.10, high=0.38)
    thin = torch.full_like(size[..., 0], 0.02)
    across_x = facing[:, :, 0, 0] == 0
    half_in = torch.stack(
        [torch.where(across_x, thin, size[..., 0]), size[..., 1], torch.where(across_x, size[..., 0], thin)], dim=-1
    )
    level = -torch.tan(path.pitch0)[:, None, None] * hit.amin(-1) + stream.uniform(
        FIXTURES, _CANDIDATES, low=-0.3, high=0.3
    )
    indoor_place = torch.stack([spot[..., 0], level, spot[..., 1]], dim=-1)

    half_out = stream.log_uniform(FIXTURES, 3, low=0.25, high=1.1)
    far = stream.log_uniform(FIXTURES, _CANDIDATES, low=1.4, high=4.5) + half_out[..., 0, None]
    level_out = (shell.high[:, 1, None, None] - half_out[..., 1, None]).expand_as(far)
    outdoor_place = torch.stack([far * direction[..., 0], level_out, far * direction[..., 1]], dim=-1)
    indoor = shell.indoor[:, None, None]
    return torch.where(indoor[..., None], indoor_place, outdoor_place), torch.where(indoor, half_in, half_out)


def _clearance(places: Tensor, half: Tensor, rotation: Tensor, motion: _Motion, moving: Tensor, eyes: Tensor) -> Tensor:
    """Least distance [B,O,K] from any camera to each candidate: exact boxes at rest, bounding balls in motion."""
    offset = eyes[:, None, None] - places[:, :, :, None]  # [B,O,K,C,3]
    local = torch.einsum("boij,bokci->bokcj", rotation, offset)
    outside = (local.abs() - half[:, :, None, None]).clamp_min(0.0)
    at_rest = outside.norm(dim=-1).amin(-1)
    time = torch.linspace(0.0, 4.0, 2 * _CHECKS, dtype=torch.float64)
    shift = motion.at(time)[0].permute(0, 2, 1, 3)  # [B,O,T,3]
    apart = (offset[:, :, :, :, None] - shift[:, :, None, None]).norm(dim=-1).amin((-1, -2))
    in_motion = apart - half.norm(dim=-1)[..., None]
    return torch.where(moving[..., None], in_motion, at_rest)
