"""Plain-torch twins of the ops of u4d_fast: the specification of each, in any floating dtype."""

from __future__ import annotations

from u4d_fast.reference.multi_stream_attention import multi_stream_attention
from u4d_fast.reference.pack_rays import pack_rays
from u4d_fast.reference.rays_to_cameras import rays_to_cameras
from u4d_fast.reference.reprojection_error import reprojection_error
from u4d_fast.reference.unpack_rays import unpack_rays
from u4d_fast.reference.warp_frames import warp_frames

__all__ = [
    "multi_stream_attention",
    "pack_rays",
    "rays_to_cameras",
    "reprojection_error",
    "unpack_rays",
    "warp_frames",
]
