"""Backward warp of frames into each other's views: checks, dispatch, tracing and gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_match, check_shape, geometry_dtype
from u4d_fast.reference.warp_frames import warp_frames as reference_warp_frames
from u4d_fast.reference.warp_frames import warp_frames_depth_grad, warp_frames_rgb_grad

GEOMETRY_SIZE = 12
"""Numbers of scratch per pair: a 3x3 matrix and an offset (csrc/kernels/warp_frames/pair_geometry.h)."""

ORDERED_SUM_DEVICES = ("cpu",)
"""Devices whose kernel adds the gradient of rgb in a fixed order; the others need integer sums to be deterministic."""


def warp_frames(
    rgb: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    *,
    occlusion: float | None = 0.05,
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Warp frame i into the view of frame j, for every pair (i, j).

    A backward warp: every pixel of j is lifted by its depth, projected into camera i, and the image of i is sampled
    there bilinearly. A pixel is valid if its depth is (finite and positive), if its point lies in front of camera i and
    lands in [0.5, W - 0.5] x [0.5, H - 0.5] of image i (so that all four taps exist; up to 0.01 pixels beyond are
    pulled back), and if it is not hidden: its depth in camera i is at most (1 + occlusion) times the depth of the
    nearest pixel of i. Where that pixel has no valid depth, nothing can be said and the pixel is not valid. The nearest
    and not an interpolated depth, because an average across a depth edge is the depth of no surface.

    Differentiable in rgb and depth; also in the cameras, which only the reference does ("auto" then takes it). Validity
    has no gradient, so none reaches the depth of i through the occlusion test.

    Args:
        rgb: [B,N,3,H,W].
        depth: [B,N,H,W] along the optical axis, in the units of the camera centres; invalid pixels are 0, NaN or inf.
        intrinsics: [B,N,3,3], pixels; the first pixel's centre is (0.5, 0.5); last row 0 0 1.
        cam_to_world: [B,N,4,4], OpenCV axes; last row 0 0 0 1. Cameras that are NaN or singular see nothing.
        pairs: [M,2] int64, rows (i, j) of frame indices.
        occlusion: relative tolerance of the occlusion test, at least 0; None: nothing is hidden.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        warped [B,M,3,H,W], 0 where not valid, and valid [B,M,H,W] bool. float64 in, float64 out (by the reference);
        half precision is computed and returned in float32.
    Raises:
        ValueError: shapes disagree, an index is out of range (noticed where pairs are on the CPU; a kernel lets such a
            pair see nothing), occlusion is negative, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        The seed's section on test-time search; spec.md section 4.
    """
    rgb, depth, intrinsics, cam_to_world, pairs = prepare(rgb, depth, intrinsics, cam_to_world, pairs, occlusion)
    cameras = {"intrinsics": intrinsics, "cam_to_world": cam_to_world}
    chosen = choose("warp_frames", backend, {"rgb": rgb, "depth": depth}, cameras)
    if chosen == "reference":
        return reference_warp_frames(rgb, depth, intrinsics, cam_to_world, pairs, occlusion=occlusion)
    warped, valid = _launch(rgb, depth, intrinsics, cam_to_world, pairs, occlusion)
    return warped, valid


def prepare(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Check the arguments that the warp and the reprojection error share; one dtype, pairs beside the images."""
    check_shape("rgb", rgb, ("B", "N", 3, "H", "W"))
    batch, frames, _, height, width = rgb.shape
    check_match("depth", depth, (batch, frames, height, width), "rgb", rgb)
    check_match("intrinsics", intrinsics, (batch, frames, 3, 3), "rgb", rgb)
    check_match("cam_to_world", cam_to_world, (batch, frames, 4, 4), "rgb", rgb)
    check_floating(rgb=rgb, depth=depth, intrinsics=intrinsics, cam_to_world=cam_to_world)
    check_shape("pairs", pairs, ("M", 2))
    if pairs.dtype != torch.int64:
        raise TypeError(f"pairs: expected int64 frame indices, got {pairs.dtype}")
    if occlusion is not None and not (occlusion >= 0 and math.isfinite(occlusion)):
        raise ValueError(f"occlusion: expected a relative tolerance of at least 0, or None, got {occlusion}")
    # On a GPU the check would wait for it, and a traced graph cannot branch on values; the kernels guard themselves.
    if not torch.compiler.is_compiling() and pairs.device.type == "cpu" and type(pairs) is Tensor and pairs.numel():
        low, high = int(pairs.min()), int(pairs.max())
        if low < 0 or high >= frames:
            wrong = low if low < 0 else high
            raise ValueError(
                f"pairs: expected frame indices 0..{frames - 1} to match rgb's {frames} frames, got {wrong}"
            )
    dtype = geometry_dtype(rgb, depth, intrinsics, cam_to_world)
    return rgb.to(dtype), depth.to(dtype), intrinsics.to(dtype), cam_to_world.to(dtype), pairs.to(rgb.device)


def choose(op: str, backend: str, differentiable: dict[str, Tensor], constant: dict[str, Tensor]) -> str:
    """Resolve the backend, given that a kernel has no gradient for the tensors in `constant`."""
    chosen = backends.resolve(op, backend, *differentiable.values(), *constant.values())
    wanted = [name for name, tensor in constant.items() if tensor.requires_grad and torch.is_grad_enabled()]
    if chosen == "reference" or not wanted:
        return chosen
    if backend == "auto" and backends.default_backend() == "auto":
        return "reference"
    raise backends.BackendError(
        f"{op}: backend {chosen!r} has no gradient for {', '.join(wanted)}: use backend='reference', or detach them"
    )


def sizes_of(rgb: Tensor, pairs: Tensor) -> tuple[int, int, int, int, int]:
    """(batch, frames, height, width, pairs), as the kernels take them."""
    batch, frames, _, height, width = rgb.shape
    return batch, frames, height, width, pairs.shape[0]


def as_number(occlusion: float | None) -> float:
    """The kernels' way to say that nothing is tested is a negative tolerance."""
    return -1.0 if occlusion is None else float(occlusion)


def scratch_geometry(rgb: Tensor, pairs: Tensor) -> Tensor:
    """Scratch for the cameras of every pair."""
    return rgb.new_empty(rgb.shape[0], pairs.shape[0], GEOMETRY_SIZE)


def _kernel(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> tuple[Tensor, Tensor]:
    inputs = [tensor.contiguous() for tensor in (rgb, depth, intrinsics, cam_to_world, pairs)]
    warped, valid = _fake(rgb, depth, intrinsics, cam_to_world, pairs, occlusion)
    scratch = scratch_geometry(rgb, pairs)
    pointers = [tensor.data_ptr() for tensor in inputs]
    outputs = [tensor.data_ptr() for tensor in (scratch, warped, valid)]
    backends.call("warp_frames", rgb.device, *pointers, *sizes_of(rgb, pairs), as_number(occlusion), *outputs)
    return warped, valid


def _reference(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> tuple[Tensor, Tensor]:
    return reference_warp_frames(rgb, depth, intrinsics, cam_to_world, pairs, occlusion=occlusion)


def _fake(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> tuple[Tensor, Tensor]:
    batch, _, _, height, width = rgb.shape
    count = pairs.shape[0]
    valid = torch.empty(batch, count, height, width, dtype=torch.bool, device=rgb.device)
    return rgb.new_empty(batch, count, 3, height, width), valid


def _depth_grad_kernel(
    grad: Tensor,
    rgb: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    occlusion: float | None,
) -> Tensor:
    inputs = [tensor.contiguous() for tensor in (grad, rgb, depth, intrinsics, cam_to_world, pairs)]
    out = torch.empty_like(inputs[2])
    scratch = scratch_geometry(rgb, pairs)
    pointers = [tensor.data_ptr() for tensor in inputs]
    outputs = [tensor.data_ptr() for tensor in (scratch, out)]
    backends.call(
        "warp_frames_depth_grad", rgb.device, *pointers, *sizes_of(rgb, pairs), as_number(occlusion), *outputs
    )
    return out


def _depth_grad_reference(
    grad: Tensor,
    rgb: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    occlusion: float | None,
) -> Tensor:
    return warp_frames_depth_grad(grad, rgb, depth, intrinsics, cam_to_world, pairs, occlusion=occlusion)


def _depth_grad_fake(
    grad: Tensor,
    rgb: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    occlusion: float | None,
) -> Tensor:
    return depth.new_empty(depth.shape)


def _rgb_grad_kernel(
    grad: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> Tensor:
    inputs = [tensor.contiguous() for tensor in (grad, depth, intrinsics, cam_to_world, pairs)]
    out = _rgb_grad_fake(grad, depth, intrinsics, cam_to_world, pairs, occlusion)
    scratch = scratch_geometry(out, pairs)
    ordered = grad.device.type in ORDERED_SUM_DEVICES
    largest = grad.new_zeros(1) if ordered or not grad.numel() else torch.linalg.vector_norm(grad, torch.inf).reshape(1)
    sums = torch.empty(0 if ordered else out.numel(), dtype=torch.int64, device=grad.device)
    pointers = [tensor.data_ptr() for tensor in inputs]
    outputs = [tensor.data_ptr() for tensor in (scratch, largest, sums, out)]
    backends.call("warp_frames_rgb_grad", grad.device, *pointers, *sizes_of(out, pairs), as_number(occlusion), *outputs)
    return out


def _rgb_grad_reference(
    grad: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> Tensor:
    return warp_frames_rgb_grad(grad, depth, intrinsics, cam_to_world, pairs, occlusion=occlusion)


def _rgb_grad_fake(
    grad: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> Tensor:
    batch, frames, height, width = depth.shape
    return depth.new_empty(batch, frames, 3, height, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rgb, depth, intrinsics, cam_to_world, pairs, occlusion = inputs
    ctx.save_for_backward(rgb, depth, intrinsics, cam_to_world, pairs)
    ctx.occlusion = occlusion
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_warped: Tensor, grad_valid: Tensor | None) -> tuple[Tensor | None, ...]:
    rgb, depth, intrinsics, cam_to_world, pairs = ctx.saved_tensors
    cameras = (intrinsics, cam_to_world, pairs, ctx.occlusion)
    grad_rgb = _launch_rgb_grad(grad_warped, depth, *cameras) if ctx.needs_input_grad[0] else None
    grad_depth = _launch_depth_grad(grad_warped, rgb, depth, *cameras) if ctx.needs_input_grad[1] else None
    return grad_rgb, grad_depth, None, None, None, None


_CAMERAS = "Tensor intrinsics, Tensor cam_to_world, Tensor pairs, float? occlusion"
_launch_depth_grad = backends.register(
    "warp_frames_depth_grad",
    f"(Tensor grad_warped, Tensor rgb, Tensor depth, {_CAMERAS}) -> Tensor",
    kernel=_depth_grad_kernel,
    reference=_depth_grad_reference,
    fake=_depth_grad_fake,
)
_launch_rgb_grad = backends.register(
    "warp_frames_rgb_grad",
    f"(Tensor grad_warped, Tensor depth, {_CAMERAS}) -> Tensor",
    kernel=_rgb_grad_kernel,
    reference=_rgb_grad_reference,
    fake=_rgb_grad_fake,
)
_launch = backends.register(
    "warp_frames",
    f"(Tensor rgb, Tensor depth, {_CAMERAS}) -> (Tensor warped, Tensor valid)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
