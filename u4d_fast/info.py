"""What was built, what is active and why."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from u4d_fast import backend as backends

OPS = (
    "pack_rays",
    "unpack_rays",
    "rays_to_cameras",
    "warp_frames",
    "reprojection_error",
    "multi_stream_attention",
    "multi_stream_attention_fp8",
    "grouped_linear",
    "grouped_linear_fp8",
    "qk_norm_rope",
    "qk_norm_rope_fp8",
    "rms_norm",
    "ada_layer_norm",
    "ada_layer_norm_fp8",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norm_fp8",
    "bias_gelu",
    "bias_gelu_fp8",
    "quantize_rows",
    "causal_norm_silu",
)


def info() -> dict[str, Any]:
    """The state of the op library on this machine.

    Returns:
        version: of the package, "unknown" in a tree that was never installed.
        torch: its version.
        kernels: {"built": bool, "reason": why not, "cuda_arch": e.g. "sm_90a" or None, "openmp": bool}.
        cuda_device: name of the visible CUDA device, or None.
        threads: threads that a CPU kernel uses.
        backend: what "auto" stands for (the environment variable U4D_BACKEND, or `use_backend`).
        ops: {op: {"cpu": {"backend", "reason"}, "cuda": {...}}}: what runs on float32 tensors of each visible device,
            and why it is not a kernel where it is not.
    """
    kernels = backends.kernels
    visible = torch.cuda.is_available()
    return {
        "version": _version(),
        "torch": torch.__version__,
        "kernels": {
            "built": kernels is not None,
            "reason": backends.missing_reason,
            "cuda_arch": getattr(kernels, "cuda_arch", None),
            "openmp": bool(getattr(kernels, "openmp", False)),
        },
        "cuda_device": torch.cuda.get_device_name() if visible else None,
        "threads": torch.get_num_threads() if getattr(kernels, "openmp", False) else 1,
        "backend": backends.default_backend(),
        "ops": {op: {device: _active(op, device) for device in ("cpu", "cuda")[: 1 + visible]} for op in OPS},
    }


def _active(op: str, device_type: str) -> dict[str, str]:
    asked = backends.default_backend()
    if asked == "reference":
        return {"backend": asked, "reason": "asked for"}
    reason = backends.unavailable(op, device_type, 0 if device_type == "cuda" else -1)
    if asked == "auto":
        return {"backend": "reference" if reason else device_type, "reason": reason}
    if asked != device_type:
        reason = f"backend {asked!r} was asked for"
    return {"backend": "none" if reason else asked, "reason": reason or "asked for"}


def _version() -> str:
    try:
        return importlib.metadata.version("u4d")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
