"""unpack_rays as the inverse of pack_rays, its kernels against the float64 reference, and its gradients."""

from __future__ import annotations

import pytest
import torch
from ray_cameras import random_cameras, rays_by_definition
from torch import Tensor

import u4d_fast
import u4d_fast.ops.unpack_rays
from u4d_fast.time_layout import latent_frames

KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(1, 1, 1, 1), (2, 2, 2, 3), (1, 7, 5, 7), (3, 18, 3, 1), (1, 50, 30, 40)]


def latents(batch: int, frames: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random packed rays (all channels filled, copies unlike each other) and scales."""
    g = torch.Generator().manual_seed(frames)
    shape = (batch, 16, latent_frames(frames), rows, columns)
    return [
        torch.randn(shape, generator=g).to(dtype),
        torch.randn(shape, generator=g).to(dtype),
        1.5 + torch.rand(batch, generator=g).to(dtype),
    ]


def to_backend(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to("cuda" if backend == "cuda" else "cpu") for tensor in tensors]


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 8, 18])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_unpacking_undoes_packing(backend: str, frames: int) -> None:
    cameras = random_cameras(2, frames, (24, 40), seed=frames)
    scale = torch.tensor([0.2, 30.0])
    given = to_backend(backend, cameras.intrinsics.float(), cameras.cam_to_world.float(), scale)
    packed = u4d_fast.pack_rays(*given, (24, 40), backend=backend)
    directions, moments = u4d_fast.unpack_rays(*packed, frames, given[2], backend=backend)
    true_directions, true_moments = rays_by_definition(cameras)
    torch.testing.assert_close(directions.cpu().double(), true_directions, rtol=0, atol=3e-6)
    torch.testing.assert_close(moments.cpu().double(), true_moments, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_copies_are_averaged(backend: str) -> None:
    ray_dir, ray_moment, scale = to_backend(backend, *latents(1, 8, 2, 3))
    directions, moments = u4d_fast.unpack_rays(ray_dir, ray_moment, 8, scale, backend=backend)
    slots = ray_dir[0, :12].unflatten(0, (4, 3))  # [slot, xyz, latent, ...]
    torch.testing.assert_close(directions[0, 0], slots[:, :, 0].mean(0))
    torch.testing.assert_close(directions[0, 4], slots[3, :, 1])
    torch.testing.assert_close(directions[0, 5], slots[0, :, 2])
    torch.testing.assert_close(directions[0, 6], slots[1:, :, 2].mean(0))
    torch.testing.assert_close(directions[0, 7], slots[:, :, 3].mean(0))
    torch.testing.assert_close(moments[0, 6], scale[0] * ray_moment[0, 3:12].unflatten(0, (3, 3))[:, :, 2].mean(0))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nan_stays_in_its_frame(backend: str) -> None:
    ray_dir, ray_moment, scale = to_backend(backend, *latents(1, 10, 2, 2))
    ray_dir[0, 3:6, 1] = torch.nan  # frame 2
    directions, moments = u4d_fast.unpack_rays(ray_dir, ray_moment, 10, scale, backend=backend)
    assert directions[0, 2].isnan().all() and moments.isfinite().all()
    assert directions[0, [f for f in range(10) if f != 2]].isfinite().all()


@pytest.mark.parametrize(("batch", "frames", "rows", "columns"), SIZES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, batch: int, frames: int, rows: int, columns: int) -> None:
    ray_dir, ray_moment, scale = latents(batch, frames, rows, columns)
    exact = u4d_fast.reference.unpack_rays(ray_dir.double(), ray_moment.double(), frames, scale.double())
    plain = u4d_fast.reference.unpack_rays(ray_dir, ray_moment, frames, scale)
    on_device = to_backend(backend, ray_dir, ray_moment, scale)
    fast = u4d_fast.unpack_rays(on_device[0], on_device[1], frames, on_device[2], backend=backend)
    for kernel, torch32, truth in zip(fast, plain, exact, strict=True):
        assert kernel.dtype == torch.float32 and kernel.shape == truth.shape
        assert (kernel.cpu() - truth).abs().max() <= 2 * (torch32 - truth).abs().max() + 1e-6


@pytest.mark.parametrize("backend", KERNELS)
def test_every_output_is_written_and_the_same_each_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = u4d_fast.ops.unpack_rays._outputs
    monkeypatch.setattr(
        u4d_fast.ops.unpack_rays, "_outputs", lambda *a: tuple(out.fill_(torch.nan) for out in plain(*a))
    )
    ray_dir, ray_moment, scale = to_backend(backend, *latents(2, 9, 3, 5))
    first = u4d_fast.unpack_rays(ray_dir, ray_moment, 9, scale, backend=backend)
    second = u4d_fast.unpack_rays(ray_dir, ray_moment, 9, scale, backend=backend)
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_strided_inputs_and_no_clips(backend: str) -> None:
    ray_dir, ray_moment, scale = to_backend(backend, *latents(2, 5, 4, 6))
    expected = u4d_fast.unpack_rays(ray_dir, ray_moment, 5, scale, backend=backend)
    strided = [ray_dir.mT.contiguous().mT, ray_moment.transpose(1, 2).contiguous().transpose(1, 2)]
    found = u4d_fast.unpack_rays(*strided, 5, scale, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    none = u4d_fast.unpack_rays(ray_dir[:0], ray_moment[:0], 5, scale[:0], backend=backend)
    assert none[0].shape == (0, 5, 3, 4, 6)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_cuda_source_on_the_host_shim(host_shim, order: str) -> None:
    ray_dir, ray_moment, scale = latents(2, 9, 7, 25)
    expected = u4d_fast.unpack_rays(ray_dir, ray_moment, 9, scale, backend="cpu")
    with host_shim("unpack_rays", order):
        found = u4d_fast.unpack_rays(ray_dir, ray_moment, 9, scale, backend="cpu")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_reference() -> None:
    ray_dir, ray_moment, scale = (value.requires_grad_() for value in latents(2, 8, 2, 2, torch.float64))
    assert torch.autograd.gradcheck(
        lambda d, m, s: u4d_fast.reference.unpack_rays(d, m, 8, s), (ray_dir, ray_moment, scale)
    )


@pytest.mark.parametrize("frames", [1, 2, 8, 10])
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_of_the_kernel_are_the_reference_ones(backend: str, frames: int) -> None:
    def gradients(which: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.requires_grad_() for value in to_backend(which, *latents(2, frames, 2, 3, dtype))]
        directions, moments = u4d_fast.unpack_rays(leaves[0], leaves[1], frames, leaves[2], backend=which)
        loss = directions.sin().sum() + moments.cos().sum()
        return [grad.cpu() for grad in torch.autograd.grad(loss, leaves)]

    for kernel, truth in zip(gradients(backend, torch.float32), gradients("reference", torch.float64), strict=True):
        torch.testing.assert_close(kernel.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_registered_op_keeps_torchs_rules(backend: str) -> None:
    ray_dir, ray_moment, scale = (value.requires_grad_() for value in to_backend(backend, *latents(1, 6, 2, 3)))
    torch.library.opcheck(torch.ops.u4d_fast.unpack_rays.default, (ray_dir, ray_moment, scale, 6))


def test_compiles_whole_with_gradients() -> None:
    given = [value.requires_grad_() for value in latents(1, 6, 2, 3)]

    def total(ray_dir: Tensor, ray_moment: Tensor, scale: Tensor) -> Tensor:
        directions, moments = u4d_fast.unpack_rays(ray_dir, ray_moment, 6, scale)
        return (directions * moments.cos()).sum()

    eager = torch.autograd.grad(total(*given), given)
    compiled = torch.autograd.grad(torch.compile(total, fullgraph=True, backend="aot_eager")(*given), given)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ray_dir": torch.zeros(1, 12, 4, 2, 3)}, r"ray_dir: expected \[B,16,F,h,w\], got \[1,12,4,2,3\]"),
        ({"ray_moment": torch.zeros(1, 16, 3, 2, 3)}, r"ray_moment: expected \[1,16,4,2,3\] to match ray_dir"),
        ({"num_frames": 50}, r"ray_dir: expected 14 latent frames for num_frames=50, got 4"),
        ({"num_frames": 0}, r"num_frames: expected at least 1, got 0"),
        ({"scale": torch.ones(1, 1)}, r"scale: expected \[B\], got \[1,1\]"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    ray_dir, ray_moment, scale = latents(1, 8, 2, 3)
    given = {"ray_dir": ray_dir, "ray_moment": ray_moment, "num_frames": 8, "scale": scale} | change
    with pytest.raises(ValueError, match=message):
        u4d_fast.unpack_rays(**given)
