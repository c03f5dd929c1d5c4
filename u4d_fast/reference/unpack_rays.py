"""Packed Plücker ray latents to one ray map per frame, in plain torch."""

from __future__ import annotations

from torch import Tensor

from u4d_fast.time_layout import FRAMES_PER_GROUP, frame_groups


def unpack_rays(ray_dir: Tensor, ray_moment: Tensor, num_frames: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Specification of `u4d_fast.unpack_rays`: same arguments and results, any floating dtype."""
    moments = _unpack(ray_moment, num_frames) * scale[:, None, None, None, None]
    return _unpack(ray_dir, num_frames), moments


def _unpack(packed: Tensor, num_frames: int) -> Tensor:
    batch, _, latent_frames, rows, columns = packed.shape
    slots = packed[:, : 3 * FRAMES_PER_GROUP].unflatten(1, (FRAMES_PER_GROUP, 3))
    slots = slots.permute(0, 3, 1, 2, 4, 5).reshape(batch, latent_frames * FRAMES_PER_GROUP, 3, rows, columns)
    frame_of_slot = frame_groups(num_frames).flatten().to(packed.device)
    copies = frame_of_slot.bincount(minlength=num_frames).to(packed.dtype)
    # Summing the copies by index, not by a matrix of weights: a NaN in one frame must not reach the others.
    total = packed.new_zeros(batch, num_frames, 3, rows, columns).index_add(1, frame_of_slot, slots)
    return total / copies[:, None, None, None]
