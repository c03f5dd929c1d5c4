"""Geometry and attention ops for multi-stream video transformers, with C++ and CUDA kernels.

Every op has a plain-torch twin of the same name under `u4d_fast.reference`, which is its specification. Depends on
torch and numpy only.
"""

from __future__ import annotations

from u4d_fast.accelerate import Acceleration, accelerate, acceleration, restore
from u4d_fast.backend import BackendError, use_backend
from u4d_fast.dense_attention import ATTENTION_BACKENDS, attention_backends, dense_attention
from u4d_fast.fp8 import Fp8Rows
from u4d_fast.info import info
from u4d_fast.ops.ada_layer_norm import ada_layer_norm
from u4d_fast.ops.ada_layer_norm_fp8 import ada_layer_norm_fp8
from u4d_fast.ops.bias_gelu import bias_gelu
from u4d_fast.ops.bias_gelu_fp8 import bias_gelu_fp8
from u4d_fast.ops.causal_norm_silu import causal_norm_silu, residual_causal_norm_silu
from u4d_fast.ops.gated_residual import gated_residual
from u4d_fast.ops.gated_residual_norm import gated_residual_norm
from u4d_fast.ops.gated_residual_norm_fp8 import gated_residual_norm_fp8
from u4d_fast.ops.grouped_linear import grouped_linear, grouped_linear_fp8
from u4d_fast.ops.multi_stream_attention import multi_stream_attention
from u4d_fast.ops.multi_stream_attention_fp8 import multi_stream_attention_fp8
from u4d_fast.ops.pack_rays import pack_rays
from u4d_fast.ops.qk_norm_rope import qk_norm_rope
from u4d_fast.ops.qk_norm_rope_fp8 import qk_norm_rope_fp8
from u4d_fast.ops.quantize_rows import quantize_rows
from u4d_fast.ops.rays_to_cameras import rays_to_cameras
from u4d_fast.ops.reprojection_error import reprojection_error
from u4d_fast.ops.rms_norm import rms_norm
from u4d_fast.ops.unpack_rays import unpack_rays
from u4d_fast.ops.warp_frames import warp_frames

__all__ = [
    "ATTENTION_BACKENDS",
    "Acceleration",
    "BackendError",
    "Fp8Rows",
    "accelerate",
    "acceleration",
    "ada_layer_norm",
    "ada_layer_norm_fp8",
    "attention_backends",
    "bias_gelu",
    "bias_gelu_fp8",
    "causal_norm_silu",
    "dense_attention",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norm_fp8",
    "grouped_linear",
    "grouped_linear_fp8",
    "info",
    "multi_stream_attention",
    "multi_stream_attention_fp8",
    "pack_rays",
    "qk_norm_rope",
    "qk_norm_rope_fp8",
    "quantize_rows",
    "rays_to_cameras",
    "reprojection_error",
    "residual_causal_norm_silu",
    "restore",
    "rms_norm",
    "unpack_rays",
    "use_backend",
    "warp_frames",
]
