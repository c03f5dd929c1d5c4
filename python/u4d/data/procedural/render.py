"""Batches of clips from indices: layout in float64 on the CPU, rays in float32 on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from u4d.clips import Clips
from u4d.data.procedural.appearance import APPEARANCE_STREAM_LENGTH, Appearance, sample_appearance
from u4d.data.procedural.camera_paths import PATH_STREAM_LENGTH, lens_intrinsics
from u4d.data.procedural.photometry import PHOTOMETRY_STREAM_LENGTH, Photometry, develop, noise_table, sample_photometry
from u4d.data.procedural.randomness import clip_streams
from u4d.data.procedural.scene_layout import (
    BOXES,
    CYLINDERS,
    LAYOUT_STREAM_LENGTH,
    SHELL,
    SPHERES,
    SURFACES,
    Layout,
    sample_layout,
)
from u4d.data.procedural.textures import noise_lattice
from u4d.data.procedural.trace import SHAPE_BOX, SHAPE_CYLINDER, SHAPE_SPHERE, FrameTables, trace_rays

_CPU_RAYS = 52_000  # rays traced at once on the CPU: the working set stays in the cache
_GPU_RAYS = 4_000_000


class ClipDescription(NamedTuple):
    """What will be rendered, float64 on the CPU."""

    layout: Layout
    appearance: Appearance
    photometry: Photometry


def describe_clips(indices: Sequence[int], split: str = "train", frames: int = 18, seed: int = 0) -> ClipDescription:
    """Draw the scenes of some indices without rendering them."""
    lengths = (LAYOUT_STREAM_LENGTH, PATH_STREAM_LENGTH, APPEARANCE_STREAM_LENGTH, PHOTOMETRY_STREAM_LENGTH)
    layout_stream, path_stream, appearance_stream, photometry_stream = clip_streams(split, seed, indices, lengths)
    layout = sample_layout(layout_stream, path_stream, frames)
    return ClipDescription(
        layout, sample_appearance(appearance_stream, layout), sample_photometry(photometry_stream, frames)
    )


def render_clips(
    indices: Sequence[int],
    split: str = "train",
    frames: int = 18,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> Clips:
    """Render the clips with the given indices.

    A clip depends on (split, seed, index, frames, size) alone, not on its neighbours in the batch; a shorter clip
    is the beginning of a longer one.

    Args:
        indices: clip numbers, see `SPLIT_LENGTHS`.
        split: "train", "val" or "test".
        frames: N >= 1. Motion is a function of the frame number: fewer frames, less motion.
        size: (H, W) in pixels.
        seed: another seed is another world.
        device: where to trace; scenes are always laid out on the CPU, so that they are the same everywhere.
        compile: trace with torch.compile (static shapes): several times faster after a slow first call, and equal
            up to rounding (a ray that grazes an edge may fall on its other side).
    Returns:
        `Clips` on `device`.
    Raises:
        ValueError: unknown split, index out of range, no frames, or an empty size.
    """
    height, width = size
    if frames < 1:
        raise ValueError(f"frames: expected at least 1, got {frames}")
    if height < 1 or width < 1:
        raise ValueError(f"size: expected (H, W) of at least 1 x 1, got {size}")
    if len(indices) == 0:
        raise ValueError("indices: expected at least one clip number, got none")
    device = torch.device(device)
    clips = describe_clips(indices, split, frames, seed)
    layout = clips.layout
    intrinsics = lens_intrinsics(layout.lens, size).float()
    cam_to_world = torch.eye(4).repeat(len(indices), frames, 1, 1)
    cam_to_world[..., :3, :3] = layout.camera_rotation.float()
    cam_to_world[..., :3, 3] = layout.camera_centre.float()
    with torch.no_grad():
        tables = _frame_tables(layout, clips.appearance, intrinsics, cam_to_world)
        rgb, depth = _trace_frames(tables, frames, size, device, compile)
        rgb = develop(rgb.view(len(indices), frames, 3, height, width), clips.photometry, _noise(str(device)))
    return Clips(rgb, depth.view(len(indices), frames, height, width), intrinsics.to(device), cam_to_world.to(device))


def _frame_tables(layout: Layout, look: Appearance, intrinsics: Tensor, cam_to_world: Tensor) -> FrameTables:
    """Tables of all frames of all clips (F = B*N), float32."""
    frames = intrinsics.shape[1]
    shell, objects = layout.surroundings, layout.objects
    sky_centre = layout.camera_centre[:, 0]
    material = look.material[:, None].expand(-1, frames, -1, -1)
    surface = torch.cat([_surface_geometry(layout, sky_centre), material], dim=-1)  # [B,N,S,C]
    lens = torch.stack(
        [1.0 / intrinsics[..., 0, 0], 1.0 / intrinsics[..., 1, 1], intrinsics[..., 0, 2], intrinsics[..., 1, 2]], dim=-1
    )

    def each_frame(x: Tensor) -> Tensor:
        return x.float().flatten(0, 1).contiguous()

    def still(x: Tensor) -> Tensor:
        return x.float().repeat_interleave(frames, dim=0)

    return FrameTables(
        lens=each_frame(lens),
        camera_rotation=each_frame(cam_to_world[..., :3, :3]),
        camera_centre=each_frame(cam_to_world[..., :3, 3]),
        room_low=still(shell.low),
        room_high=still(shell.high),
        sky_centre=still(sky_centre),
        sky_radius=still(shell.sky_radius),
        object_rotation=each_frame(objects.rotation),
        object_centre=each_frame(objects.centre),
        object_half=still(objects.half),
        surface=each_frame(surface),
        light_position=still(look.light_position),
        light_colour=still(look.light_colour),
        ambient=still(look.ambient),
        haze_colour=still(look.haze_colour),
        falloff=still(look.falloff),
        haze=still(look.haze),
        corner=still(look.corner),
    )


def _surface_geometry(layout: Layout, sky_centre: Tensor) -> Tensor:
    """Axes, centre, half size and shape of every surface, [B,N,SURFACES,16]; walls are faces of one big box."""
    shell, objects = layout.surroundings, layout.objects
    batch, frames = objects.centre.shape[:2]
    identity = torch.eye(3, dtype=torch.float64).expand(batch, frames, SHELL, 3, 3)
    rotation = torch.cat([identity, objects.rotation], dim=2).flatten(-2)
    # An open wall is very far; a box centred on the eye keeps coordinates along the ground small.
    bounded = shell.indoor[:, None]
    centre = torch.where(bounded, 0.5 * (shell.low + shell.high), torch.zeros_like(shell.low))
    half = torch.where(bounded, 0.5 * (shell.high - shell.low), shell.high)
    centres = torch.cat([centre[:, None].expand(-1, SHELL - 1, -1), sky_centre[:, None]], dim=1)
    halves = torch.cat(
        [half[:, None].expand(-1, SHELL - 1, -1), shell.sky_radius[:, None, None].expand(-1, 1, 3)], dim=1
    )
    centres = torch.cat([centres[:, None].expand(-1, frames, -1, -1), objects.centre], dim=2)
    halves = torch.cat([halves, objects.half], dim=1)[:, None].expand(-1, frames, -1, -1)
    shapes = [SHAPE_BOX] * (SHELL - 1) + [SHAPE_SPHERE]
    shapes += [SHAPE_BOX] * BOXES + [SHAPE_SPHERE] * SPHERES + [SHAPE_CYLINDER] * CYLINDERS
    shape = torch.tensor(shapes, dtype=torch.float64)[:, None].expand(batch, frames, SURFACES, 1)
    return torch.cat([rotation, centres, halves, shape], dim=-1)


def _trace_frames(
    tables: FrameTables, frames: int, size: tuple[int, int], device: torch.device, compile: bool
) -> tuple[Tensor, Tensor]:
    """Linear rgb [F,3,H*W] and depth [F,H*W] of all frames, chunk by chunk."""
    height, width = size
    u, v = _ray_positions(size, device)
    lattice = _lattice(str(device))
    total = len(tables.lens)
    rgb = torch.empty(total, 3, height * width, device=device)
    depth = torch.empty(total, height * width, device=device)
    tracer = _compiled_tracer() if compile else _trace_pixels
    # on the CPU a chunk never crosses clips: a clip's bits then cannot depend on its neighbours
    whole, budget = (frames, _CPU_RAYS) if device.type == "cpu" else (total, _GPU_RAYS)
    step = _frames_at_once(whole, len(u), budget)
    for start in range(0, total, step):
        rows = slice(start, start + step)
        chunk = FrameTables(*(field[rows].to(device) for field in tables))
        depth[rows], rgb[rows] = tracer(u, v, chunk, lattice, height, width)
    return rgb, depth


def _frames_at_once(frames: int, rays: int, budget: int) -> int:
    """The largest divisor of `frames` that fits: all chunks then have one shape, which compiles once."""
    return max(step for step in range(1, frames + 1) if frames % step == 0 and (step == 1 or step * rays <= budget))


def _ray_positions(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel centres (H*W) followed by pixel corners ((H+1)*(W+1))."""
    height, width = size
    rows, columns = torch.arange(height + 1, device=device), torch.arange(width + 1, device=device)
    centre_v, centre_u = torch.meshgrid(rows[:-1] + 0.5, columns[:-1] + 0.5, indexing="ij")
    corner_v, corner_u = torch.meshgrid(rows.float(), columns.float(), indexing="ij")
    return torch.cat([centre_u.flatten(), corner_u.flatten()]), torch.cat([centre_v.flatten(), corner_v.flatten()])


def _trace_pixels(
    u: Tensor, v: Tensor, tables: FrameTables, lattice: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Depth at pixel centres and colour averaged over a quincunx: 0.6 of the centre, 0.1 of each corner."""
    depth, _, colour = trace_rays(u, v, tables, lattice)
    pixels = height * width
    corners = colour[:, :, pixels:].reshape(-1, 3, height + 1, width + 1)
    around = corners[..., :-1, :-1] + corners[..., :-1, 1:] + corners[..., 1:, :-1] + corners[..., 1:, 1:]
    rgb = 0.6 * colour[:, :, :pixels] + 0.1 * around.flatten(-2)
    return depth[:, :pixels], rgb


@lru_cache(maxsize=1)
def _compiled_tracer() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_trace_pixels, dynamic=False)


@lru_cache(maxsize=4)
def _lattice(device: str) -> Tensor:
    return noise_lattice(device)


@lru_cache(maxsize=4)
def _noise(device: str) -> Tensor:
    return noise_table(device)
