"""Ray maps to pinhole cameras."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_image_size, check_match, check_shape, describe, geometry_dtype
from u4d_fast.reference.pack_rays import CELL
from u4d_fast.reference.rays_to_cameras import rays_to_cameras as reference_rays_to_cameras

OPTION_SHARED_INTRINSICS, OPTION_SQUARE_PIXELS, OPTION_ROBUST = 1, 2, 4  # as in rays_to_cameras.h


def rays_to_cameras(
    directions: Tensor,
    moments: Tensor,
    image_size: tuple[int, int],
    *,
    intrinsics: Tensor | None = None,
    shared_intrinsics: bool = False,
    square_pixels: bool = False,
    robust: bool = True,
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a pinhole camera without skew to every ray map.

    Minimises the angle between observed and fitted directions over rotation and intrinsics, then finds the centre o
    from m = o x d; the method stands in `u4d_fast/reference/rays_to_cameras.py`, after the seed's section on ray maps
    and spec.md section 1. Never NaN: cells with a non-finite or zero ray have no weight, and a frame whose cells
    determine no camera is flagged. Not differentiable: the results are constants.

    What it can tell apart: with 2 % of noise on 30x40 cells a rotation is good to 0.5 degrees at a field of view of 60
    degrees, to 0.14 at 120, but only to 4.6 at 20, since there turning the camera and moving its principal point look
    alike. Known or shared intrinsics resolve it.

    Args:
        directions: [B,N,3,h,w] world directions through the centres of 8x8 pixels, of any length.
        moments: [B,N,3,h,w] o x (unit direction); the centres come out in their unit.
        image_size: (height, width) in pixels, (8h, 8w).
        intrinsics: [B,N,3,3] known intrinsics in pixels (skew is respected), or None to fit them.
        shared_intrinsics: one set of intrinsics for all frames of a clip.
        square_pixels: fx = fy.
        robust: errors far above the noise lose their weight; False is plain least squares, 7 % more efficient under
            Gaussian noise and useless with outliers.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        intrinsics [B,N,3,3] and cam_to_world [B,N,4,4] (OpenCV), and residual [B,N]: RMS angle in radians over the
        cells with weight. A frame without a camera has residual inf, the identity as its pose and, unless they are
        known, the clip's shared or else a 60 degree camera's intrinsics. float64 in, float64 out (by the reference);
        half precision is returned in float32.
    Raises:
        ValueError: shapes disagree, or the backend can't be had.
        TypeError: a dtype is not floating.
    """
    check_shape("directions", directions, ("B", "N", 3, "h", "w"))
    check_match("moments", moments, directions.shape, "directions", directions)
    check_floating(directions=directions, moments=moments)
    height, width = check_image_size(image_size, CELL)
    if tuple(directions.shape[3:]) != (height // CELL, width // CELL):
        wanted = f"[B,N,3,{height // CELL},{width // CELL}]"
        raise ValueError(
            f"directions: expected {wanted} for image_size {(height, width)}, got {describe(directions.shape)}"
        )
    given = [directions, moments]
    if intrinsics is not None:
        check_match("intrinsics", intrinsics, (*directions.shape[:2], 3, 3), "directions", directions)
        check_floating(intrinsics=intrinsics)
        given.append(intrinsics)
    dtype = geometry_dtype(*given)
    given = [tensor.to(dtype) for tensor in given]
    options = (
        OPTION_SHARED_INTRINSICS * shared_intrinsics + OPTION_SQUARE_PIXELS * square_pixels + OPTION_ROBUST * robust
    )
    chosen = backends.resolve("rays_to_cameras", backend, *given)
    known = given[2] if intrinsics is not None else None
    fit = _reference if chosen == "reference" else _launch
    fitted, cam_to_world, residual = fit(given[0], given[1], known, height, width, options)
    return fitted, cam_to_world, residual


def _outputs(directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames = directions.shape[:2]
    return (
        directions.new_empty(batch, frames, 3, 3),
        directions.new_empty(batch, frames, 4, 4),
        directions.new_empty(batch, frames),
    )


@torch.no_grad()
def _kernel(
    directions: Tensor, moments: Tensor, intrinsics: Tensor | None, height: int, width: int, options: int
) -> tuple[Tensor, Tensor, Tensor]:
    directions, moments = directions.contiguous(), moments.contiguous()
    known = None if intrinsics is None else intrinsics.contiguous()
    fitted, cam_to_world, residual = _outputs(directions)
    batch, frames, _, rows, columns = directions.shape
    assert backends.kernels is not None
    scratch = backends.kernels.rays_to_cameras_workspace(batch, frames, rows, columns)
    workspace = torch.empty(scratch, dtype=torch.uint8, device=directions.device)
    backends.call(
        "rays_to_cameras",
        directions.device,
        directions.data_ptr(),
        moments.data_ptr(),
        0 if known is None else known.data_ptr(),
        *(tensor.data_ptr() for tensor in (fitted, cam_to_world, residual, workspace)),
        *(batch, frames, rows, columns, height, width, options),
    )
    return fitted, cam_to_world, residual


def _reference(
    directions: Tensor, moments: Tensor, intrinsics: Tensor | None, height: int, width: int, options: int
) -> tuple[Tensor, Tensor, Tensor]:
    return reference_rays_to_cameras(
        directions,
        moments,
        (height, width),
        intrinsics=intrinsics,
        shared_intrinsics=bool(options & OPTION_SHARED_INTRINSICS),
        square_pixels=bool(options & OPTION_SQUARE_PIXELS),
        robust=bool(options & OPTION_ROBUST),
    )


def _fake(
    directions: Tensor, moments: Tensor, intrinsics: Tensor | None, height: int, width: int, options: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(directions)


_launch = backends.register(
    "rays_to_cameras",
    "(Tensor directions, Tensor moments, Tensor? intrinsics, SymInt height, SymInt width, int options)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
)
