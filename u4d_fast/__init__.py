"""Geometry and attention ops for multi-stream video transformers, with C++ and CUDA kernels.

Every op has a plain-torch twin of the same name under `u4d_fast.reference`, which is its specification. Depends on
torch and numpy only.
"""

from __future__ import annotations

from u4d_fast.backend import BackendError, use_backend
from u4d_fast.info import info
from u4d_fast.ops.multi_stream_attention import multi_stream_attention
from u4d_fast.ops.pack_rays import pack_rays
from u4d_fast.ops.rays_to_cameras import rays_to_cameras
from u4d_fast.ops.reprojection_error import reprojection_error
from u4d_fast.ops.unpack_rays import unpack_rays
from u4d_fast.ops.warp_frames import warp_frames

__all__ = [
    "BackendError",
    "info",
    "multi_stream_attention",
    "pack_rays",
    "rays_to_cameras",
    "reprojection_error",
    "unpack_rays",
    "use_backend",
    "warp_frames",
]
