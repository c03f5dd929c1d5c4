"""Clips <-> the four image-shaped streams that the model sees (spec.md section 1).

RGB and the depth channel are images; the two ray streams are already packed as latents, since rays bypass the codec.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import u4d_fast
from u4d.clips import Clips
from u4d.geometry.depth import channel_to_depth, clip_scale, depth_to_channel, fill_invalid, valid_depth

# A decoded channel is off by about .02 (40 dB), and near -1 that is the difference between 100 and infinitely many
# scales: what lies beyond counts as 100 scales away, or a few pixels of sky would outweigh the picture.
FARTHEST = 2 / (1 + 100) - 1


@dataclass(frozen=True)
class Streams:
    """The four streams of a batch of clips; what is not known is None.

    Attributes:
        rgb: `[B,N,3,H,W]` in [-1,1].
        depth: `[B,N,1,H,W]`, the depth channel `D~` in [-1,1].
        ray_dir, ray_moment: `[B,16,F,h,w]` packed Plücker rays.
    """

    rgb: Tensor | None = None
    depth: Tensor | None = None
    ray_dir: Tensor | None = None
    ray_moment: Tensor | None = None


def to_streams(clips: Clips, scale: Tensor, image_size: tuple[int, int]) -> Streams:
    """Clips -> streams, in units of `scale` `[B]`. Cameras should be relative to the first known one.

    A frame without any valid depth keeps no information of its own: it is filled like any invalid pixel.
    """
    ray_dir = ray_moment = depth = None
    if clips.cam_to_world is not None and clips.intrinsics is not None:
        ray_dir, ray_moment = u4d_fast.pack_rays(clips.intrinsics, clips.cam_to_world, scale, image_size)
    if clips.depth is not None:
        depth = depth_to_channel(fill_invalid(clips.depth), scale)[:, :, None]
    return Streams(
        rgb=None if clips.rgb is None else clips.rgb * 2 - 1, depth=depth, ray_dir=ray_dir, ray_moment=ray_moment
    )


def to_clips(
    streams: Streams,
    num_frames: int,
    scale: Tensor,
    shared_intrinsics: bool = True,
    known_intrinsics: Tensor | None = None,
) -> tuple[Clips, Tensor]:
    """Complete streams -> clips, and the residual `[B,N]` of each frame's camera fit (radians; inf: no camera found).

    The pinhole camera of a frame need not be the model's exact ray map; the residual tells how far off it is.
    `known_intrinsics`, `[3,3]` or anything that expands to `[B,N,3,3]`, are taken as they are instead of fitted.

    Raises:
        ValueError: a stream is missing.
    """
    if streams.rgb is None or streams.depth is None or streams.ray_dir is None or streams.ray_moment is None:
        missing = [name for name, stream in vars(streams).items() if stream is None]
        raise ValueError(f"streams: expected all four, got no {', '.join(missing)}")
    known = None if known_intrinsics is None else known_intrinsics.expand(*streams.rgb.shape[:2], 3, 3)
    directions, moments = u4d_fast.unpack_rays(streams.ray_dir, streams.ray_moment, num_frames, scale)
    image_size = (streams.rgb.shape[-2], streams.rgb.shape[-1])
    intrinsics, cam_to_world, residual = u4d_fast.rays_to_cameras(
        directions, moments, image_size, intrinsics=known, shared_intrinsics=shared_intrinsics
    )
    clips = Clips(
        rgb=((streams.rgb + 1) / 2).clamp(0, 1),
        depth=decoded_depth(streams.depth[:, :, 0], scale),
        intrinsics=intrinsics,
        cam_to_world=cam_to_world,
    )
    return clips, residual


def decoded_depth(channel: Tensor, scale: Tensor | float) -> Tensor:
    """Depth from a channel that a codec has decoded: at most 100 scales, see `FARTHEST`. Shapes: `channel_to_depth`."""
    return channel_to_depth(channel.clamp_min(FARTHEST), scale)


def observed_scale(clips: Clips, context: Tensor, frames_of_group: Tensor) -> Tensor:
    """The scale that inference would compute from a sample's context, else from the truth (spec.md section 1).

    Args:
        clips: the full clips.
        context: bool `[B,4,F]`, which groups are observed.
        frames_of_group: `[F,4]` from `frame_groups`.
    Returns:
        `[B]` scales.
    """
    scales = []
    for index, observed in enumerate(context.to(frames_of_group.device)):
        depth = pick(clips.depth, index, frames_of_group[observed[1]])
        cameras = pick(clips.cam_to_world, index, frames_of_group[observed[2] & observed[3]])
        if not has_depth(depth) and cameras is None:
            everything = torch.arange(int(frames_of_group.max()) + 1)
            depth, cameras = pick(clips.depth, index, everything), pick(clips.cam_to_world, index, everything)
        scales.append(clip_scale(depth, cameras))
    return torch.tensor(scales, device=context.device)


def pick(values: Tensor | None, clip: int, frames: Tensor) -> Tensor | None:
    """The named frames of one clip, in order and once each; None where there are none."""
    if values is None or frames.numel() == 0:
        return None
    return values[clip, frames.unique().to(values.device)]


def has_depth(depth: Tensor | None) -> bool:
    """Whether any pixel is valid."""
    return depth is not None and bool(valid_depth(depth).any())
