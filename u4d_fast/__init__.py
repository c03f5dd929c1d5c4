"""Geometry and attention ops for multi-stream video transformers, with C++ and CUDA kernels.

Every op has a plain-torch twin of the same name under `u4d_fast.reference`, which is its specification. Depends on
torch and numpy only.
"""

from __future__ import annotations

from u4d_fast.accelerate import Acceleration, accelerate, acceleration, restore
from u4d_fast.backend import BackendError, use_backend
from u4d_fast.dense_attention import ATTENTION_BACKENDS, attention_backends, dense_attention
from u4d_fast.info import info
from u4d_fast.ops.ada_layer_norm import ada_layer_norm
from u4d_fast.ops.bias_gelu import bias_gelu
from u4d_fast.ops.gated_residual import gated_residual
from u4d_fast.ops.gated_residual_norm import gated_residual_norm
from u4d_fast.ops.multi_stream_attention import multi_stream_attention
from u4d_fast.ops.pack_rays import pack_rays
from u4d_fast.ops.qk_norm_rope import qk_norm_rope
from u4d_fast.ops.rays_to_cameras import rays_to_cameras
from u4d_fast.ops.reprojection_error import reprojection_error
from u4d_fast.ops.rms_norm import rms_norm
from u4d_fast.ops.unpack_rays import unpack_rays
from u4d_fast.ops.warp_frames import warp_frames

__all__ = [
    "ATTENTION_BACKENDS",
    "Acceleration",
    "BackendError",
    "accelerate",
    "acceleration",
    "ada_layer_norm",
    "attention_backends",
    "bias_gelu",
    "dense_attention",
    "gated_residual",
    "gated_residual_norm",
    "info",
    "multi_stream_attention",
    "pack_rays",
    "qk_norm_rope",
    "rays_to_cameras",
    "reprojection_error",
    "restore",
    "rms_norm",
    "unpack_rays",
    "use_backend",
    "warp_frames",
]
