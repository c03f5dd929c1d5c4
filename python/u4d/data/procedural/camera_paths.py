"""Smooth random camera paths and lenses.

World: y points down, and the unit of length of this file is the scene's typical depth (scene_layout multiplies).
One formula covers all kinds of motion, in the axes of the first camera's heading:

    centre(e) = travel * e + pivot - Ry(turn * e) @ pivot,    yaw(e) = yaw_0 + turn * e

`pivot = 0` gives dollies, trucks and pans, `pivot = (0,0,D)` an orbit that keeps looking at its pivot and
`pivot = (r,0,0)` an arc driven along its tangent. `e` is the path parameter: 0 at frame 0, 1 at frame 17.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.data.procedural.randomness import UniformStream
from u4d.data.procedural.rotations import pitch_matrix, roll_matrix, yaw_matrix

PATH_STREAM_LENGTH = 160
PERIOD = 17.0  # frames from the first to the last of a nominal 18-frame clip
OVERSHOOT = 0.15  # longer clips turn round softly this far past either end and come back
KINDS = ("dolly", "truck", "orbit", "pan", "arc", "handheld")
_KIND_WEIGHTS = (0.26, 0.18, 0.19, 0.14, 0.15, 0.08)
_WAVES = 3


@dataclass(frozen=True)
class Lens:
    """Horizontal field of view and the shape of the pixel grid: fov_x_rad [B,N], pixel_aspect [B] = fx/fy,
    centre_offset [B,2] in fractions of (W, H)."""

    fov_x_rad: Tensor
    pixel_aspect: Tensor
    centre_offset: Tensor


@dataclass(frozen=True)
class PathParameters:
    """Everything random about the camera motion of a batch, in typical depths and radians, float64."""

    kind: Tensor  # [B] index into KINDS
    yaw0: Tensor  # [B]
    pitch0: Tensor  # [B]
    roll0: Tensor  # [B]
    travel: Tensor  # [B,3] in the axes of the first heading
    pivot: Tensor  # [B,3]
    turn: Tensor  # [B] total change of yaw
    tilt: Tensor  # [B] total change of pitch
    twist: Tensor  # [B] total change of roll
    easing: Tensor  # [B] unevenness of the speed
    shake_amplitude: Tensor  # [B,6,W] x y z (typical depths), yaw pitch roll (rad)
    shake_cycles: Tensor  # [B,6,W] cycles per PERIOD
    shake_phase: Tensor  # [B,6,W]


def path_parameter(frame: Tensor) -> Tensor:
    """Frame index -> path parameter: k/17 up to frame 17, after that back and forth with soft turns.

    Clips of any length stay on the stretch [-OVERSHOOT, 1 + OVERSHOOT] that was checked for collisions, and a
    clip of few frames is the beginning of the clip of many.
    """
    time = frame / PERIOD
    turn_time = math.pi * OVERSHOOT
    cycle = torch.remainder(time, 2.0 * (1.0 + turn_time))
    upper = 1.0 + OVERSHOOT * torch.sin((cycle - 1.0) / OVERSHOOT)
    back = 2.0 + turn_time - cycle
    lower = -OVERSHOOT * torch.sin((cycle - 2.0 - turn_time) / OVERSHOOT)
    returning = torch.where(cycle <= 2.0 + turn_time, back, lower)
    return torch.where(cycle <= 1.0, cycle, torch.where(cycle <= 1.0 + turn_time, upper, returning))


def sample_lens(stream: UniformStream, frames: int) -> Lens:
    """Fields of view of 35-100 degrees, a slow zoom in a tenth of the clips, square pixels in 70 %."""
    wide = stream.uniform(low=35.0, high=100.0)
    usual = 42.0 + 40.0 * stream.uniform(2).mean(-1)
    fov_x = torch.deg2rad(torch.where(stream.chance(0.5), wide, usual))
    ratio = stream.log_uniform(low=0.78, high=1.28)
    zooming = stream.chance(0.1)
    e = path_parameter(torch.arange(frames, dtype=torch.float64))
    focal_gain = torch.where(zooming[:, None], ratio[:, None] ** e, torch.ones(1, frames, dtype=torch.float64))
    fov_x = 2.0 * torch.atan(torch.tan(fov_x / 2.0)[:, None] / focal_gain)
    aspect = stream.log_uniform(low=0.75, high=1.35)
    aspect = torch.where(stream.chance(0.7), torch.ones_like(aspect), aspect)
    offset = stream.uniform(2, low=-0.04, high=0.04)
    offset = torch.where(stream.chance(0.6)[:, None], torch.zeros_like(offset), offset)
    return Lens(fov_x.clamp(math.radians(35.0), math.radians(100.0)), aspect, offset)


def lens_intrinsics(lens: Lens, size: tuple[int, int]) -> Tensor:
    """Intrinsics in pixels [B,N,3,3], pixel centres at .5, of an image of `size` (H, W)."""
    height, width = size
    fx = 0.5 * width / torch.tan(lens.fov_x_rad / 2.0)
    fy = fx / lens.pixel_aspect[:, None]
    matrix = torch.zeros(*fx.shape, 3, 3, dtype=fx.dtype)
    matrix[..., 0, 0] = fx
    matrix[..., 1, 1] = fy
    matrix[..., 0, 2] = width * (0.5 + lens.centre_offset[:, None, 0])
    matrix[..., 1, 2] = height * (0.5 + lens.centre_offset[:, None, 1])
    matrix[..., 2, 2] = 1.0
    return matrix


def _signed(stream: UniformStream, magnitude: Tensor) -> Tensor:
    return torch.where(stream.chance(0.5), magnitude, -magnitude)


def sample_path(stream: UniformStream, pitch0: Tensor, yaw0: Tensor) -> PathParameters:
    """Draw the motion of each clip, given the first camera's pitch and yaw (rad, [B])."""
    kind = stream.choice(_KIND_WEIGHTS)
    weight = {name: (kind == i).to(torch.float64) for i, name in enumerate(KINDS)}
    zero = torch.zeros_like(pitch0)

    reach = 0.30 * torch.exp(0.65 * stream.normal())
    forward = torch.where(stream.chance(0.75), reach, -0.8 * reach).clamp(-0.8, 1.5)
    along_gaze = torch.where(stream.chance(0.5), -torch.sin(pitch0), zero)
    side = 0.25 * stream.normal()
    dolly = torch.stack([forward * side, forward * along_gaze, forward], dim=-1)
    lateral = _signed(stream, (0.75 * reach).clamp_max(0.8))
    pedestal = stream.chance(0.2).to(torch.float64)
    rest = 0.2 * lateral * stream.normal()
    truck = torch.stack([lateral * (1 - pedestal), 0.6 * lateral * pedestal + 0.3 * rest, rest], dim=-1)
    drift = 0.05 * stream.normal(3)

    orbit_angle = _signed(stream, torch.deg2rad(4.0 + 25.0 * stream.uniform(2).prod(-1).sqrt()))
    pan_angle = _signed(stream, torch.deg2rad(2.0 + 34.0 * stream.uniform(2).prod(-1).sqrt()))
    pan_tilt = stream.uniform()  # 0: all pan, 1: nearly all tilt
    pan_tilt = pan_tilt * pan_tilt
    arc_angle = _signed(stream, torch.deg2rad(stream.log_uniform(low=3.0, high=28.0)))
    wander = torch.deg2rad(torch.tensor([3.5, 2.0, 1.2], dtype=torch.float64)) * stream.normal(3)

    orbit_radius = stream.uniform(low=0.65, high=1.15)
    orbit_rise = 0.08 * stream.normal()
    arc_pivot = torch.stack([(reach / arc_angle.abs()) * arc_angle.sign(), zero, zero], dim=-1)
    pivot = weight["orbit"][:, None] * torch.stack([zero, zero, orbit_radius], dim=-1)
    pivot = pivot + weight["arc"][:, None] * arc_pivot
    orbit_travel = torch.stack([zero, orbit_rise, 0.15 * stream.normal() * weight["orbit"]], dim=-1)
    travel = weight["dolly"][:, None] * dolly + weight["truck"][:, None] * truck
    travel = travel + weight["orbit"][:, None] * orbit_travel + weight["pan"][:, None] * drift

    calm = 1.0 - 0.75 * weight["handheld"]
    turn = weight["orbit"] * orbit_angle + weight["arc"] * arc_angle + weight["pan"] * pan_angle * (1 - pan_tilt)
    turn = turn + calm * wander[:, 0] * (weight["dolly"] + weight["truck"] + weight["handheld"])
    tilt = calm * wander[:, 1] + weight["pan"] * 0.7 * pan_angle * pan_tilt
    tilt = tilt + weight["orbit"] * torch.atan(orbit_rise / orbit_radius)
    shake = _sample_shake(stream, weight["handheld"])
    return PathParameters(
        kind=kind,
        yaw0=yaw0,
        pitch0=pitch0,
        roll0=torch.deg2rad(2.0 * stream.normal() * torch.where(stream.chance(0.1), 4.0, 1.0)),
        travel=travel,
        pivot=pivot,
        turn=turn,
        tilt=tilt,
        twist=calm * wander[:, 2],
        easing=0.45 * stream.uniform(low=-1.0, high=1.0),
        shake_amplitude=shake[0],
        shake_cycles=shake[1],
        shake_phase=shake[2],
    )


def _sample_shake(stream: UniformStream, handheld: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cycles = stream.log_uniform(6, _WAVES, low=0.35, high=2.6)
    phase = stream.uniform(6, _WAVES, high=2.0 * math.pi)
    strength = stream.log_uniform(low=0.15, high=1.0)
    strength = torch.where(stream.chance(0.55), strength, torch.zeros_like(strength))
    strength = torch.where(handheld > 0, 1.0 + stream.uniform(high=1.6), strength)
    step = torch.tensor([0.008, 0.008, 0.008] + [math.radians(0.45)] * 3, dtype=torch.float64)
    amplitude = strength[:, None, None] * step[:, None] * stream.uniform(6, _WAVES, low=0.3, high=1.0) / cycles
    return amplitude, cycles, phase


def path_poses(path: PathParameters, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Camera rotations [B,N,3,3] and centres [B,N,3] (typical depths, first centre near 0) at `frame` [N]."""
    e = path_parameter(frame)[None, :]
    e = e + path.easing[:, None] * torch.sin(2.0 * math.pi * e) / (2.0 * math.pi)
    time = frame / PERIOD
    waves = torch.sin(2.0 * math.pi * path.shake_cycles[..., None] * time + path.shake_phase[..., None])
    shake = (path.shake_amplitude[..., None] * waves).sum(dim=2)  # [B,6,N]
    heading = yaw_matrix(path.yaw0)[:, None]
    orbit = path.pivot[:, None] - torch.einsum("bnij,bj->bni", yaw_matrix(path.turn[:, None] * e), path.pivot)
    local = path.travel[:, None] * e[..., None] + orbit + shake[:, :3].transpose(1, 2)
    centre = (heading @ local[..., None])[..., 0]
    yaw = path.yaw0[:, None] + path.turn[:, None] * e + shake[:, 3]
    pitch = path.pitch0[:, None] + path.tilt[:, None] * e + shake[:, 4]
    roll = path.roll0[:, None] + path.twist[:, None] * e + shake[:, 5]
    return yaw_matrix(yaw) @ pitch_matrix(pitch) @ roll_matrix(roll), centre
