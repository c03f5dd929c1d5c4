"""Cameras to packed Plücker ray latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_image_size, check_match, check_shape, geometry_dtype
from u4d_fast.reference.pack_rays import CELL, RAY_CHANNELS
from u4d_fast.reference.pack_rays import pack_rays as reference_pack_rays
from u4d_fast.time_layout import frame_groups, latent_frames


def pack_rays(
    intrinsics: Tensor,
    cam_to_world: Tensor,
    scale: Tensor,
    image_size: tuple[int, int],
    *,
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Describe every latent cell by its viewing ray: unit direction d and moment m = o x d.

    A ray goes through the centre of the cell's 8x8 pixels; o is the camera centre divided by `scale`. A latent frame
    holds four frames in channels 0..11 as (frame, xyz), laid out in time by `u4d_fast.time_layout`; channels 12..15
    are zero. Plücker rays as in the seed, section "Ray maps"; spec.md section 1.

    Differentiable in intrinsics, cam_to_world and scale.

    Args:
        intrinsics: [B,N,3,3], pixels; the first pixel's centre is (0.5, 0.5). Last row 0 0 1; focal lengths are not 0
            (not checked: that would wait for the GPU).
        cam_to_world: [B,N,4,4], OpenCV axes, rigid (not checked), N >= 1.
        scale: [B], in the unit of the centres, positive (not checked).
        image_size: (height, width) in pixels, multiples of 8.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        ray_dir and ray_moment, each [B,16,F,height/8,width/8]. float64 in, float64 out (by the reference); half
        precision is computed and returned in float32.
    Raises:
        ValueError: shapes disagree, the image size is no multiple of 8, or the backend can't be had.
        TypeError: a dtype is not floating.
    """
    check_shape("intrinsics", intrinsics, ("B", "N", 3, 3))
    batch, frames = intrinsics.shape[:2]
    check_shape("cam_to_world", cam_to_world, ("B", "N", 4, 4))
    check_match("cam_to_world", cam_to_world, (batch, frames, 4, 4), "intrinsics", intrinsics)
    check_shape("scale", scale, ("B",))
    check_match("scale", scale, (batch,), "intrinsics", intrinsics)
    check_floating(intrinsics=intrinsics, cam_to_world=cam_to_world, scale=scale)
    height, width = check_image_size(image_size, CELL)
    latent_frames(frames)  # refuses a clip without frames
    dtype = geometry_dtype(intrinsics, cam_to_world, scale)
    intrinsics, cam_to_world, scale = intrinsics.to(dtype), cam_to_world.to(dtype), scale.to(dtype)
    if backends.resolve("pack_rays", backend, intrinsics, cam_to_world, scale) == "reference":
        return reference_pack_rays(intrinsics, cam_to_world, scale, (height, width))
    ray_dir, ray_moment = _launch(intrinsics, cam_to_world, scale, height, width)
    return ray_dir, ray_moment


def _outputs(intrinsics: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    batch, frames = intrinsics.shape[:2]
    shape = (batch, RAY_CHANNELS, latent_frames(frames), height // CELL, width // CELL)
    return intrinsics.new_empty(shape), intrinsics.new_empty(shape)


def _kernel(intrinsics: Tensor, cam_to_world: Tensor, scale: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    intrinsics, cam_to_world, scale = intrinsics.contiguous(), cam_to_world.contiguous(), scale.contiguous()
    ray_dir, ray_moment = _outputs(intrinsics, height, width)
    batch, frames = intrinsics.shape[:2]
    backends.call(
        "pack_rays",
        intrinsics.device,
        *(tensor.data_ptr() for tensor in (intrinsics, cam_to_world, scale, ray_dir, ray_moment)),
        *(batch, frames, ray_dir.shape[2], height // CELL, width // CELL),
    )
    return ray_dir, ray_moment


def _reference(
    intrinsics: Tensor, cam_to_world: Tensor, scale: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    return reference_pack_rays(intrinsics, cam_to_world, scale, (height, width))


def _fake(intrinsics: Tensor, cam_to_world: Tensor, scale: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    return _outputs(intrinsics, height, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    intrinsics, cam_to_world, scale, ctx.height, ctx.width = inputs
    ctx.save_for_backward(intrinsics, cam_to_world, scale)


def _backward(ctx: Any, grad_dir: Tensor, grad_moment: Tensor) -> tuple[Tensor | None, ...]:
    intrinsics, cam_to_world, scale = ctx.saved_tensors
    gradients = pack_rays_grad(intrinsics, cam_to_world, scale, ctx.height, ctx.width, grad_dir, grad_moment)
    return (*gradients, None, None)


def pack_rays_grad(
    intrinsics: Tensor,
    cam_to_world: Tensor,
    scale: Tensor,
    height: int,
    width: int,
    grad_dir: Tensor,
    grad_moment: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of intrinsics, cam_to_world and scale, by the chain rule written out, in plain torch."""
    fx, skew, cx, fy, cy = (
        intrinsics[..., row, column, None, None] for row, column in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2))
    )
    rows = CELL * (torch.arange(height // CELL, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5)
    columns = CELL * (torch.arange(width // CELL, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5)
    y = ((rows[:, None] - cy) / fy).expand(*fy.shape[:2], len(rows), len(columns))
    x = (columns - cx - skew * y) / fx
    in_camera = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    rotations = cam_to_world[..., None, None, :3, :3]
    in_world = (rotations @ in_camera[..., None]).squeeze(-1)
    length = in_world.square().sum(-1, keepdim=True).sqrt()
    directions = in_world / length
    translations = cam_to_world[..., :3, 3]
    centres = (translations / scale[:, None, None])[:, :, None, None].expand_as(directions)

    grad_d, grad_m = (_unpack_sum(grad, intrinsics.shape[1]) for grad in (grad_dir, grad_moment))
    grad_centres = torch.linalg.cross(directions, grad_m).sum((2, 3))
    grad_d = grad_d + torch.linalg.cross(grad_m, centres)
    grad_world = (grad_d - directions * (grad_d * directions).sum(-1, keepdim=True)) / length
    grad_rotations = torch.einsum("bnhwi,bnhwj->bnij", grad_world, in_camera)
    grad_x, grad_y, _ = (rotations.mT @ grad_world[..., None]).squeeze(-1).unbind(-1)
    grad_y = grad_y - grad_x * skew / fx

    zero = torch.zeros_like(fx[..., 0, 0])
    of_x = (-(grad_x * x / fx).sum((2, 3)), -(grad_x * y / fx).sum((2, 3)), -(grad_x / fx).sum((2, 3)))
    of_y = (zero, -(grad_y * y / fy).sum((2, 3)), -(grad_y / fy).sum((2, 3)))
    grad_intrinsics = torch.stack([*of_x, *of_y, zero, zero, zero], dim=-1).unflatten(-1, (3, 3))
    grad_pose = torch.cat([grad_rotations, (grad_centres / scale[:, None, None])[..., None]], dim=-1)
    grad_pose = torch.nn.functional.pad(grad_pose, (0, 0, 0, 1))
    grad_scale = -(grad_centres * translations).sum((1, 2)) / scale**2
    return grad_intrinsics, grad_pose, grad_scale


def _unpack_sum(packed: Tensor, frames: int) -> Tensor:
    """[B,16,F,h,w] -> [B,N,h,w,3]: the sum over the slots of each frame, the transpose of packing."""
    batch, _, latents, rows, columns = packed.shape
    slots = packed[:, :12].unflatten(1, (4, 3)).permute(0, 3, 1, 4, 5, 2).reshape(batch, latents * 4, rows, columns, 3)
    owner = frame_groups(frames).flatten().to(packed.device)
    return packed.new_zeros(batch, frames, rows, columns, 3).index_add(1, owner, slots)


_launch = backends.register(
    "pack_rays",
    "(Tensor intrinsics, Tensor cam_to_world, Tensor scale, SymInt height, SymInt width) -> (Tensor, Tensor)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
