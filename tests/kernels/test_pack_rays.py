"""pack_rays against its definition, its kernels against the float64 reference, and its gradients."""

from __future__ import annotations

import pytest
import torch
from ray_cameras import random_cameras, rays_by_definition
from torch import Tensor

import u4d_fast
import u4d_fast.ops.pack_rays
from u4d_fast.time_layout import frame_groups

KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ORDERS = ["forward", "reverse"]
SIZES = [(1, 1, (8, 8)), (2, 2, (16, 24)), (1, 7, (40, 56)), (3, 18, (24, 8)), (1, 50, (240, 320))]


def arguments(batch: int, frames: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    cameras = random_cameras(batch, frames, size, seed=frames)
    cameras.intrinsics[..., 0, 1] = 3.0  # some skew
    scale = torch.linspace(0.3, 40.0, batch, dtype=torch.float64)
    return cameras.intrinsics.to(dtype), cameras.cam_to_world.to(dtype), scale.to(dtype)


def to_backend(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to("cuda" if backend == "cuda" else "cpu") for tensor in tensors]


def test_reference_is_the_ray_through_each_block_in_the_time_layout() -> None:
    frames, size = 7, (16, 40)
    cameras = random_cameras(2, frames, size, seed=1)
    scale = torch.tensor([2.0, 0.5], dtype=torch.float64)
    ray_dir, ray_moment = u4d_fast.reference.pack_rays(cameras.intrinsics, cameras.cam_to_world, scale, size)
    directions, moments = rays_by_definition(cameras)
    moments = moments / scale[:, None, None, None, None]
    assert ray_dir.shape == ray_moment.shape == (2, 16, 4, 2, 5)
    for latent, group in enumerate(frame_groups(frames).tolist()):
        for slot, frame in enumerate(group):
            channels = slice(3 * slot, 3 * slot + 3)
            torch.testing.assert_close(ray_dir[:, channels, latent], directions[:, frame])
            torch.testing.assert_close(ray_moment[:, channels, latent], moments[:, frame])
    assert not ray_dir[:, 12:].any() and not ray_moment[:, 12:].any()


@pytest.mark.parametrize(("batch", "frames", "size"), SIZES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, batch: int, frames: int, size: tuple[int, int]) -> None:
    single = arguments(batch, frames, size, torch.float32)
    exact = u4d_fast.reference.pack_rays(*(value.double() for value in single), size)
    plain = u4d_fast.reference.pack_rays(*single, size)
    fast = u4d_fast.pack_rays(*to_backend(backend, *single), size, backend=backend)
    for kernel, torch32, truth in zip(fast, plain, exact, strict=True):
        assert kernel.dtype == torch.float32 and kernel.shape == truth.shape
        floor = 1e-7 * (1 + truth.abs().max())
        assert (kernel.cpu() - truth).abs().max() <= 2 * (torch32 - truth).abs().max() + floor
        assert (kernel.cpu() - truth).norm() <= 2 * (torch32 - truth).norm() + floor


@pytest.mark.parametrize("backend", KERNELS)
def test_every_output_is_written_and_the_same_each_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = u4d_fast.ops.pack_rays._outputs
    monkeypatch.setattr(u4d_fast.ops.pack_rays, "_outputs", lambda *a: tuple(out.fill_(torch.nan) for out in plain(*a)))
    given = to_backend(backend, *arguments(2, 9, (24, 40), torch.float32))
    first = u4d_fast.pack_rays(*given, (24, 40), backend=backend)
    second = u4d_fast.pack_rays(*given, (24, 40), backend=backend)
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_strided_inputs_and_no_clips(backend: str) -> None:
    intrinsics, cam_to_world, scale = to_backend(backend, *arguments(2, 5, (16, 16), torch.float32))
    expected = u4d_fast.pack_rays(intrinsics, cam_to_world, scale, (16, 16), backend=backend)
    strided = (intrinsics.mT.contiguous().mT, cam_to_world.repeat(1, 1, 1, 2)[..., :4], scale.repeat(2)[:2])
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    for a, b in zip(u4d_fast.pack_rays(*strided, (16, 16), backend=backend), expected, strict=True):
        assert torch.equal(a, b)
    none = u4d_fast.pack_rays(intrinsics[:0], cam_to_world[:0], scale[:0], (16, 16), backend=backend)
    assert none[0].shape == (0, 16, 3, 2, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_cuda_source_on_the_host_shim(host_shim, order: str) -> None:
    given = arguments(2, 9, (40, 136), torch.float32)
    expected = u4d_fast.pack_rays(*given, (40, 136), backend="cpu")
    with host_shim("pack_rays", order):
        found = u4d_fast.pack_rays(*given, (40, 136), backend="cpu")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    given = to_backend("cuda", *arguments(2, 18, (96, 128), torch.float32))
    expected = u4d_fast.pack_rays(*given, (96, 128), backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = u4d_fast.pack_rays(*given, (96, 128), backend="cuda")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_of_the_reference() -> None:
    given = [value.requires_grad_() for value in arguments(2, 4, (16, 16), torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: u4d_fast.reference.pack_rays(*a, (16, 16)), given)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_of_the_kernel_are_the_reference_ones(backend: str) -> None:
    size = (24, 32)
    single = arguments(2, 8, size, torch.float32)
    g = torch.Generator().manual_seed(3)

    def gradients(given: list[Tensor], which: str) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in given]
        outputs = u4d_fast.pack_rays(*leaves, size, backend=which)
        g.manual_seed(3)
        weights = [torch.randn(out.shape, generator=g).to(out) for out in outputs]
        return [grad.cpu() for grad in torch.autograd.grad(outputs, leaves, weights)]

    exact = gradients([value.double() for value in single], "reference")
    plain = gradients(list(single), "reference")
    fast = gradients(to_backend(backend, *single), backend)
    for kernel, torch32, truth in zip(fast, plain, exact, strict=True):
        limit = 2 * (torch32 - truth).abs().max() + 1e-5 * truth.abs().max()
        assert (kernel - truth).abs().max() <= limit


@pytest.mark.parametrize("backend", KERNELS)
def test_registered_op_keeps_torchs_rules(backend: str) -> None:
    intrinsics, cam_to_world, scale = to_backend(backend, *arguments(1, 5, (16, 24), torch.float32))
    for tensor in (intrinsics, cam_to_world, scale):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.u4d_fast.pack_rays.default, (intrinsics, cam_to_world, scale, 16, 24))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_whole_with_gradients(backend: str) -> None:
    given = [value.requires_grad_() for value in arguments(1, 5, (16, 24), torch.float32)]

    def length(*tensors: Tensor) -> Tensor:
        ray_dir, ray_moment = u4d_fast.pack_rays(*tensors, (16, 24), backend=backend)
        return (ray_dir * ray_moment.cos()).sum()

    eager = torch.autograd.grad(length(*given), given)
    compiled = torch.autograd.grad(torch.compile(length, fullgraph=True, backend="aot_eager")(*given), given)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_in_single() -> None:
    given = arguments(1, 3, (16, 16), torch.float32)
    half = [value.bfloat16() for value in given]
    found = u4d_fast.pack_rays(*half, (16, 16))
    expected = u4d_fast.pack_rays(*(value.float() for value in half), (16, 16))
    assert found[0].dtype == torch.float32 and torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intrinsics": torch.zeros(1, 3, 4, 4)}, r"intrinsics: expected \[B,N,3,3\], got \[1,3,4,4\]"),
        (
            {"cam_to_world": torch.zeros(1, 2, 4, 4)},
            r"cam_to_world: expected \[1,3,4,4\] to match intrinsics .*, got \[1,2,4,4\]",
        ),
        ({"scale": torch.ones(2)}, r"scale: expected \[1\] to match intrinsics"),
        ({"image_size": (16, 20)}, r"image_size: expected positive multiples of 8, got \(16, 20\)"),
        ({"image_size": (0, 16)}, r"image_size: expected positive multiples of 8"),
        (
            {"intrinsics": torch.zeros(1, 0, 3, 3), "cam_to_world": torch.zeros(1, 0, 4, 4)},
            "num_frames: expected at least 1",
        ),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    intrinsics, cam_to_world, scale = arguments(1, 3, (16, 16), torch.float32)
    given = {"intrinsics": intrinsics, "cam_to_world": cam_to_world, "scale": scale, "image_size": (16, 16)} | change
    with pytest.raises(ValueError, match=message):
        u4d_fast.pack_rays(**given)


def test_integers_are_refused() -> None:
    intrinsics, cam_to_world, scale = arguments(1, 3, (16, 16), torch.float32)
    with pytest.raises(TypeError, match=r"intrinsics: expected a floating dtype, got torch\.int64"):
        u4d_fast.pack_rays(intrinsics.long(), cam_to_world, scale, (16, 16))
