"""Plain-torch twins of the ops of u4d_fast: the specification of each, in any floating dtype."""

from __future__ import annotations

from u4d_fast.reference.ada_layer_norm import ada_layer_norm
from u4d_fast.reference.ada_layer_norm_fp8 import ada_layer_norm_fp8
from u4d_fast.reference.bias_gelu import bias_gelu
from u4d_fast.reference.bias_gelu_fp8 import bias_gelu_fp8
from u4d_fast.reference.causal_norm_silu import causal_norm_silu, residual_causal_norm_silu
from u4d_fast.reference.gated_residual import gated_residual
from u4d_fast.reference.gated_residual_norm import gated_residual_norm
from u4d_fast.reference.gated_residual_norm_fp8 import gated_residual_norm_fp8
from u4d_fast.reference.grouped_linear import grouped_linear, grouped_linear_fp8
from u4d_fast.reference.multi_stream_attention import multi_stream_attention
from u4d_fast.reference.multi_stream_attention_fp8 import multi_stream_attention_fp8
from u4d_fast.reference.pack_rays import pack_rays
from u4d_fast.reference.qk_norm_rope import qk_norm_rope
from u4d_fast.reference.qk_norm_rope_fp8 import qk_norm_rope_fp8
from u4d_fast.reference.quantize_rows import quantize_rows
from u4d_fast.reference.rays_to_cameras import rays_to_cameras
from u4d_fast.reference.reprojection_error import reprojection_error
from u4d_fast.reference.rms_norm import rms_norm
from u4d_fast.reference.unpack_rays import unpack_rays
from u4d_fast.reference.warp_frames import warp_frames

__all__ = [
    "ada_layer_norm",
    "ada_layer_norm_fp8",
    "bias_gelu",
    "bias_gelu_fp8",
    "causal_norm_silu",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norm_fp8",
    "grouped_linear",
    "grouped_linear_fp8",
    "multi_stream_attention",
    "multi_stream_attention_fp8",
    "pack_rays",
    "qk_norm_rope",
    "qk_norm_rope_fp8",
    "quantize_rows",
    "rays_to_cameras",
    "reprojection_error",
    "residual_causal_norm_silu",
    "rms_norm",
    "unpack_rays",
    "warp_frames",
]
