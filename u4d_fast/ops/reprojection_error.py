"""How well the frames of a clip agree under their own depth and cameras: checks, dispatch and tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.ops.warp_frames import as_number, choose, prepare, scratch_geometry, sizes_of
from u4d_fast.reference.reprojection_error import reprojection_error as reference_reprojection_error

ROWS_PER_BLOCK = 8
"""Rows that the kernels sum as one task, on CPU and GPU. Part of the result's bits, so a constant."""


def reprojection_error(
    rgb: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    pairs: Tensor,
    *,
    occlusion: float | None = 0.05,
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean absolute colour difference between frames j and frames i warped into their views, over the visible pixels.

    What test-time search scores candidates with: the seed's
    e = 1/|P| sum_(i,j) ||M_ij (warp_i->j - I_j)||_1 / (||M_ij||_1 + eps), with the norm's mean taken over the three
    colours. The warp and the mask M_ij are those of `warp_frames`; nothing of size M*H*W is stored.

    Where the formula would reward a candidate for showing nothing, this differs from it: a pair without a visible pixel
    has error 1, the largest that colours in [0,1] can have, and not 0. A pair in which a colour that counts is not
    finite has error +inf, so that a minimum over candidates never picks it (argmin would pick a NaN). Few visible
    pixels make a noisy error: look at `overlap` before a pair decides anything.

    The kernels' sums do not depend on the number of threads: the same input gives the same bits. They have no gradient:
    where one is wanted "auto" takes the reference; to train on a photometric loss, `warp_frames` is the faster way.

    Args:
        rgb: [B,N,3,H,W] in [0,1].
        depth, intrinsics, cam_to_world, pairs, occlusion, backend: as in `warp_frames`; at least one pair.
    Returns:
        error [B], the mean over pairs; pair_error [B,M]; overlap [B,M], the share of j's pixels that are visible in i.
    Raises:
        ValueError: as `warp_frames`, or there are no pairs.
        TypeError: a dtype is wrong.
    Source:
        The seed's section on test-time search; spec.md section 4.
    """
    rgb, depth, intrinsics, cam_to_world, pairs = prepare(rgb, depth, intrinsics, cam_to_world, pairs, occlusion)
    if pairs.shape[0] == 0:
        raise ValueError("pairs: expected at least one pair to average over, got [0,2]")
    tensors = {"rgb": rgb, "depth": depth, "intrinsics": intrinsics, "cam_to_world": cam_to_world}
    chosen = choose("reprojection_error", backend, {}, tensors)
    if chosen == "reference":
        return reference_reprojection_error(rgb, depth, intrinsics, cam_to_world, pairs, occlusion=occlusion)
    error, pair_error, overlap = _launch(rgb, depth, intrinsics, cam_to_world, pairs, occlusion)
    return error, pair_error, overlap


def _kernel(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [tensor.contiguous() for tensor in (rgb, depth, intrinsics, cam_to_world, pairs)]
    sizes = batch, _, height, _, count = sizes_of(rgb, pairs)
    blocks = -(-height // ROWS_PER_BLOCK)
    sums = torch.empty(batch, count, blocks, 2, dtype=torch.float64, device=rgb.device)
    results = _fake(rgb, depth, intrinsics, cam_to_world, pairs, occlusion)
    scratch = scratch_geometry(rgb, pairs)
    pointers = [tensor.data_ptr() for tensor in inputs]
    outputs = [tensor.data_ptr() for tensor in (scratch, sums, *results)]
    backends.call("reprojection_error", rgb.device, *pointers, *sizes, as_number(occlusion), ROWS_PER_BLOCK, *outputs)
    return results


def _reference(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return reference_reprojection_error(rgb, depth, intrinsics, cam_to_world, pairs, occlusion=occlusion)


def _fake(
    rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, pairs: Tensor, occlusion: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = rgb.shape[0], pairs.shape[0]
    return rgb.new_empty(batch), rgb.new_empty(batch, count), rgb.new_empty(batch, count)


_launch = backends.register(
    "reprojection_error",
    "(Tensor rgb, Tensor depth, Tensor intrinsics, Tensor cam_to_world, Tensor pairs, float? occlusion)"
    " -> (Tensor error, Tensor pair_error, Tensor overlap)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
)
