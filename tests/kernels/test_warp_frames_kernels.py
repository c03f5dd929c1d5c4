"""The kernels of the warp and of its gradients against the reference, and the reference against torch's own sampler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from warp_scenes import (
    Clip,
    assert_no_worse,
    flat_clip,
    gradients_on,
    pixel_grid,
    random_clip,
    rendered_clip,
    sample_by_torch,
    sine_weights,
    warp_on,
)

import u4d_fast.backend
from u4d_fast import warp_frames
from u4d_fast.reference.warp_frames import warp_frames as reference_warp_frames
from u4d_fast.reference.warp_frames import warp_frames_depth_grad, warp_frames_rgb_grad

HostShim = Callable[[str, str], AbstractContextManager[None]]
KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", *KERNELS]


# Against oracles.


def test_reference_agrees_with_lifting_to_the_world_and_torch_sampling() -> None:
    clip = random_clip(21, 26, frames=3, batch=2).to(torch.float64)
    warped, valid = reference_warp_frames(*clip.arguments(), occlusion=None)
    for b in range(2):
        for m, (i, j) in enumerate(clip.pairs.tolist()):
            rays = torch.linalg.inv(clip.intrinsics[b, j]) @ pixel_grid(21, 26)
            points = torch.cat((rays * clip.depth[b, j].flatten(), torch.ones(1, 21 * 26)))
            seen_by_i = torch.linalg.inv(clip.cam_to_world[b, i]) @ clip.cam_to_world[b, j] @ points
            projected = clip.intrinsics[b, i] @ seen_by_i[:3]
            x, y = projected[0] / projected[2], projected[1] / projected[2]
            inside = (projected[2] > 0) & (x >= 0.5) & (x <= 25.5) & (y >= 0.5) & (y <= 20.5)
            inside = inside.view(21, 26)
            assert (inside != valid[b, m]).sum() <= 3  # a hundredth of a pixel of tolerance
            expected = sample_by_torch(clip.rgb[b, i], projected) * inside
            torch.testing.assert_close(warped[b, m] * inside, expected, rtol=0, atol=1e-9)


SHAPES = [
    (24, 32, 4, 2),
    (1, 1, 2, 1),
    (1, 7, 2, 1),
    (5, 1, 2, 2),
    (2, 2, 3, 1),
    (3, 129, 2, 1),
    (4, 256, 2, 1),
    (9, 300, 2, 1),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("occlusion", [0.05, None])
def test_kernel_is_as_exact_as_plain_torch(backend: str, shape: tuple[int, ...], occlusion: float | None) -> None:
    clip = rendered_clip(*shape)
    exact, exact_valid = reference_warp_frames(*clip.to(torch.float64).arguments(), occlusion=occlusion)
    plain, plain_valid = reference_warp_frames(*clip.arguments(), occlusion=occlusion)
    fast, fast_valid = warp_on(clip, backend, occlusion)
    assert ((fast_valid != exact_valid).double().mean()) <= 1e-3  # rounding can tip a pixel at a threshold
    assert (fast[~fast_valid[:, :, None].expand_as(fast)] == 0).all()
    common = (fast_valid & plain_valid & exact_valid)[:, :, None]
    assert common.any()
    assert_no_worse(fast * common, plain * common, exact * common, floor=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_handles_nothing_to_do(backend: str) -> None:
    clip = random_clip(6, 8)
    warped, valid = warp_on(replace(clip, pairs=torch.zeros(0, 2, dtype=torch.int64)), backend)
    assert warped.shape == (1, 0, 3, 6, 8) and valid.shape == (1, 0, 6, 8)
    none = Clip(*(part[:0] for part in clip.arguments()[:4]), pairs=clip.pairs)
    assert warp_on(none, backend)[0].shape == (0, 2, 3, 6, 8)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_takes_any_memory_layout(backend: str) -> None:
    clip = random_clip(12, 18, frames=3, batch=2)
    strided = Clip(
        clip.rgb.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        torch.stack((clip.depth, clip.depth), -1)[..., 0],
        clip.intrinsics.mT.contiguous().mT,
        clip.cam_to_world.transpose(0, 1).contiguous().transpose(0, 1),
        clip.pairs.T.contiguous().T,
    )
    assert not any(part.is_contiguous() for part in strided.arguments())
    for fast, plain in zip(warp_on(strided, backend), warp_on(clip, backend), strict=True):
        assert torch.equal(fast, plain)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_writes_every_element_and_repeats_itself(backend: str) -> None:
    clip = random_clip(13, 200, frames=3)
    first, valid = warp_on(clip, backend)
    torch.use_deterministic_algorithms(True)  # torch then fills new tensors with NaN
    try:
        second, second_valid = warp_on(clip, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second) and torch.equal(valid, second_valid)


def test_threads_do_not_change_a_bit() -> None:
    clip = random_clip(31, 45, frames=3, batch=2)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append([*warp_on(clip, "cpu"), *gradients_on(clip, "cpu")])
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_reads_nothing_outside_its_arrays(backend: str) -> None:
    clip = random_clip(6, 8)
    module = sys.modules["u4d_fast.ops.warp_frames"]
    clip = replace(clip, pairs=torch.tensor([(0, 5), (-3, 1), (1, 0)])).to("cuda" if backend == "cuda" else "cpu")
    warped, valid = module._kernel(*clip.arguments(), 0.05)  # past the checks, as a traced graph goes
    assert not valid[:, :2].any() and (warped[:, :2] == 0).all() and valid[:, 2].any()
    grad_rgb = module._rgb_grad_kernel(torch.ones_like(warped), *clip.arguments()[1:], 0.05)
    grad_depth = module._depth_grad_kernel(torch.ones_like(warped), *clip.arguments(), 0.05)
    assert (grad_rgb[:, 0] == 0).all() and (grad_depth[:, 1] == 0).all()


# The CUDA source on the CPU.


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("shape", [(9, 33, 3, 2), (1, 1, 2, 1), (1, 7, 2, 1), (5, 1, 2, 1)])
def test_cuda_source_agrees_with_the_cpu_kernel(
    host_shim: HostShim, monkeypatch: pytest.MonkeyPatch, order: str, shape: tuple[int, ...]
) -> None:
    clip = rendered_clip(*shape)
    clip.depth[0, 0, 0, 0] = float("nan")
    expected = [[*warp_on(clip, "cpu", occlusion), *gradients_on(clip, "cpu")] for occlusion in (0.05, None)]
    monkeypatch.setattr(sys.modules["u4d_fast.ops.warp_frames"], "ORDERED_SUM_DEVICES", ())
    torch.use_deterministic_algorithms(True)  # torch then fills new tensors with NaN
    try:
        with host_shim("warp_frames", order):
            results = [[*warp_on(clip, "cpu", occlusion), *gradients_on(clip, "cpu")] for occlusion in (0.05, None)]
    finally:
        torch.use_deterministic_algorithms(False)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result[1], wanted[1])
        for part, wanted_part in zip(result, wanted, strict=True):
            torch.testing.assert_close(part, wanted_part, rtol=1e-4, atol=1e-4)


def test_cuda_source_adds_gradients_alike_in_any_order(host_shim: HostShim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["u4d_fast.ops.warp_frames"], "ORDERED_SUM_DEVICES", ())
    clip = random_clip(12, 40, frames=3)
    results = []
    for order in ("forward", "reverse"):
        with host_shim("warp_frames", order):
            results.append(gradients_on(clip, "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_cuda_source_keeps_its_promises(host_shim: HostShim, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has tests of its own above for the other backends: odd pairs, gradients that are not finite, no pairs."""
    module = sys.modules["u4d_fast.ops.warp_frames"]
    monkeypatch.setattr(module, "ORDERED_SUM_DEVICES", ())
    with host_shim("warp_frames", "forward"):
        test_a_kernel_reads_nothing_outside_its_arrays("cpu")
        test_a_gradient_that_is_not_finite_is_told("cpu")
        test_invalid_pixels_get_and_give_no_gradient("cpu")
        test_kernel_handles_nothing_to_do("cpu")
        test_gradients_write_every_element_and_repeat_themselves("cpu")
        test_kernel_gradients_are_as_exact_as_plain_torch("cpu", (9, 33, 3, 1))
        clip = replace(random_clip(4, 5), pairs=torch.zeros(0, 2, dtype=torch.int64))
        assert all((grad == 0).all() for grad in gradients_on(clip, "cpu"))


# Gradients.


def test_gradcheck_of_the_reference() -> None:
    clip = rendered_clip(5, 6, frames=2, batch=1).to(torch.float64)
    tensors = [part.clone().requires_grad_() for part in clip.arguments()[:4]]

    def warped(rgb: Tensor, depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor) -> Tensor:
        return reference_warp_frames(rgb, depth, intrinsics, cam_to_world, clip.pairs)[0]

    # A bilinear surface has creases; this clip has none within eps.
    assert torch.autograd.gradcheck(warped, tensors, eps=1e-7, atol=1e-5, rtol=1e-4)


def test_written_out_gradients_of_the_reference_are_those_of_autograd() -> None:
    clip = rendered_clip(9, 14, frames=3, batch=2).to(torch.float64)
    clip.depth[0, 1, 3, 4] = float("nan")
    cameras = (clip.intrinsics, clip.cam_to_world, clip.pairs)
    weights = sine_weights(torch.empty(2, 6, 3, 9, 14, dtype=torch.float64))
    grad_rgb, grad_depth = gradients_on(clip, "reference", weights)
    torch.testing.assert_close(warp_frames_rgb_grad(weights, clip.depth, *cameras), grad_rgb, rtol=0, atol=1e-12)
    written_out = warp_frames_depth_grad(weights, clip.rgb, clip.depth, *cameras)
    torch.testing.assert_close(written_out, grad_depth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(24, 32, 4, 2), (1, 7, 2, 1), (5, 1, 2, 1), (6, 131, 3, 1)])
def test_kernel_gradients_are_as_exact_as_plain_torch(backend: str, shape: tuple[int, ...]) -> None:
    clip = rendered_clip(*shape)
    double = clip.to(torch.float64)
    masks = [warp_on(clip, backend)[1], warp_on(clip, "reference")[1], reference_warp_frames(*double.arguments())[1]]
    common = (masks[0] & masks[1] & masks[2])[:, :, None].double()
    weights = sine_weights(common.expand(-1, -1, 3, -1, -1).contiguous()) * common
    exact = gradients_on(double, "reference", weights)
    plain = gradients_on(clip, "reference", weights.float())
    fast = gradients_on(clip, backend, weights.float())
    assert exact[0].norm() > 0
    for fast_part, plain_part, exact_part in zip(fast, plain, exact, strict=True):
        assert_no_worse(fast_part, plain_part, exact_part, floor=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_pixels_get_and_give_no_gradient(backend: str) -> None:
    clip = flat_clip(2.0, 2.0)
    clip.depth[0, 1, 3, 4] = float("nan")
    clip.depth[0, 1, 2, 2] = 0.0
    clip.depth[0, 0, 5, 6] = float("inf")
    grad_rgb, grad_depth = gradients_on(clip, backend)
    assert grad_rgb.isfinite().all() and grad_depth.isfinite().all()
    assert (grad_depth[0, 0] == 0).all() and (grad_depth[0, 1, [3, 2, 5], [4, 2, 6]] == 0).all()
    assert (grad_rgb[0, 1] == 0).all() and grad_rgb[0, 0].norm() > 1


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_write_every_element_and_repeat_themselves(backend: str) -> None:
    clip = random_clip(13, 150, frames=3)
    clip = replace(
        clip, pairs=torch.tensor([(0, 1), (2, 1)])
    )  # frames without a pair must become 0, not stay unwritten
    first = gradients_on(clip, backend)
    torch.use_deterministic_algorithms(True)
    try:
        second = gradients_on(clip, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (first[0][:, 1] == 0).all() and (first[1][:, [0, 2]] == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_a_gradient_that_is_not_finite_is_told(backend: str) -> None:
    clip = flat_clip(2.0, 2.0)
    weights = torch.ones(1, 1, 3, 8, 11)
    weights[0, 0, 0, 4, 4] = float("nan")
    grad_rgb, grad_depth = gradients_on(clip, backend, weights)
    assert grad_rgb[0, 0, 0].isnan().any() and grad_depth[0, 1, 4, 4].isnan()


def test_cameras_get_gradients_from_the_reference_only() -> None:
    clip = rendered_clip(8, 10, frames=2, batch=1)
    cam_to_world = clip.cam_to_world.clone().requires_grad_()
    tensors = replace(clip, cam_to_world=cam_to_world).arguments()
    (grad,) = torch.autograd.grad(warp_frames(*tensors)[0].sum(), cam_to_world)
    assert grad.norm() > 0
    with pytest.raises(u4d_fast.backend.BackendError, match="no gradient for cam_to_world"):
        warp_frames(*tensors, backend="cpu")
    with torch.no_grad():
        warp_frames(*tensors, backend="cpu")
