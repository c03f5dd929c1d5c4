"""rays_to_cameras: the kernels find what the reference finds, and keep torch's rules."""

from __future__ import annotations

import importlib
import time

import pytest
import torch
from ray_cameras import (
    BACKENDS,
    KERNELS,
    SIZE,
    SMALL,
    assert_camera_close,
    fit,
    random_cameras,
    rays_by_definition,
    rotation_error_deg,
    with_noise,
)
from torch import Tensor

import u4d_fast
import u4d_fast.ops.rays_to_cameras

reference_fit = importlib.import_module("u4d_fast.reference.rays_to_cameras")

# Kernel against reference, and torch's rules.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_intrinsics": True},
        {"square_pixels": True},
        {"robust": False},
        {"shared_intrinsics": True, "square_pixels": True},
    ],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_finds_what_the_float64_reference_finds(backend: str, options: dict) -> None:
    size = (56, 104)
    cameras = random_cameras(2, 7, size, seed=14, distance=5.0, fov_deg=(40.0, 100.0))
    directions, moments = with_noise(*rays_by_definition(cameras), 0.01)
    directions[0, 3, :, 2:] = torch.nan
    exact = u4d_fast.reference.rays_to_cameras(directions.float().double(), moments.float().double(), size, **options)
    found = fit(directions, moments, size, backend, **options)
    assert rotation_error_deg(found[1], exact[1]).max() < 1e-3
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def hand_over_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and scratch full of NaN bytes, so that what a kernel forgets to write shows."""
    plain = u4d_fast.ops.rays_to_cameras._outputs
    empty = torch.empty

    def spoilt_outputs(directions: Tensor) -> tuple[Tensor, ...]:
        return tuple(out.fill_(torch.nan) for out in plain(directions))

    def spoilt_empty(*size: int, **options: object) -> Tensor:
        scratch = empty(*size, **options)
        return scratch.fill_(255) if scratch.dtype == torch.uint8 else scratch

    monkeypatch.setattr(u4d_fast.ops.rays_to_cameras, "_outputs", spoilt_outputs)
    monkeypatch.setattr(torch, "empty", spoilt_empty)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_every_output_is_written_and_the_same_each_time(
    backend: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over_nan(monkeypatch)
    directions, moments = with_noise(*rays_by_definition(random_cameras(2, 11, (40, 56), seed=15)), 0.02)
    directions[1, 4] = 0.0
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(fit(directions, moments, (40, 56), backend, shared_intrinsics=shared))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("shared", [False, True])
def test_cuda_source_on_the_host_shim(host_shim, order: str, shared: bool) -> None:
    directions, moments = with_noise(*rays_by_definition(random_cameras(1, 3, (40, 56), seed=16)), 0.01)
    directions[0, 1, :, :, 3:] = torch.nan
    expected = fit(directions, moments, (40, 56), "cpu", shared_intrinsics=shared)
    with host_shim("rays_to_cameras", order):
        found = fit(directions, moments, (40, 56), "cpu", shared_intrinsics=shared)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_no_frames(backend: str) -> None:
    directions, moments = rays_by_definition(random_cameras(2, 3, (24, 32), seed=17))
    expected = fit(directions, moments, (24, 32), backend)
    strided = (directions.transpose(2, 4).contiguous().transpose(2, 4), moments.mT.contiguous().mT)
    for a, b in zip(fit(*strided, (24, 32), backend), expected, strict=True):
        assert torch.equal(a, b)
    for none in (directions[:0], directions[:, :0]):
        found = fit(none, none, (24, 32), backend)
        assert [value.shape for value in found] == [(*none.shape[:2], 3, 3), (*none.shape[:2], 4, 4), none.shape[:2]]


def test_double_stays_double_and_half_becomes_single() -> None:
    cameras = random_cameras(1, 2, SMALL, seed=18)
    found = u4d_fast.rays_to_cameras(*rays_by_definition(cameras), SMALL)
    assert all(value.dtype == torch.float64 for value in found)
    assert_camera_close(found, cameras, 1e-9)
    half = u4d_fast.rays_to_cameras(*(value.half() for value in rays_by_definition(cameras)), SMALL)
    assert all(value.dtype == torch.float32 for value in half)


@pytest.mark.parametrize("backend", KERNELS)
def test_registered_op_keeps_torchs_rules(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    rays = [value.float().to(device) for value in rays_by_definition(random_cameras(1, 2, (16, 24), seed=19))]
    op = torch.ops.u4d_fast.rays_to_cameras.default
    torch.library.opcheck(op, (*rays, None, 16, 24, 4))
    torch.library.opcheck(op, (*rays, torch.eye(3, device=device).expand(1, 2, 3, 3), 16, 24, 4))


def test_compiles_whole() -> None:
    rays = [value.float() for value in rays_by_definition(random_cameras(1, 2, (16, 24), seed=20))]

    def call(directions: Tensor, moments: Tensor) -> tuple[Tensor, ...]:
        return u4d_fast.rays_to_cameras(directions, moments, (16, 24), shared_intrinsics=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*rays), call(*rays), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_results_are_constants(backend: str) -> None:
    rays = [value.float().requires_grad_() for value in rays_by_definition(random_cameras(1, 2, (16, 24), seed=21))]
    assert not any(value.requires_grad for value in u4d_fast.rays_to_cameras(*rays, (16, 24), backend=backend))


def test_a_clip_takes_less_than_twenty_milliseconds_on_one_core() -> None:
    """The issue's demand, by the CPU time of the thread: other programs on the machine don't count."""
    directions, moments = with_noise(*rays_by_definition(random_cameras(1, 50, SIZE, seed=22)), 0.02)
    given = (directions.float(), moments.float())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spent = []
    for _ in range(8):
        start = time.thread_time()
        u4d_fast.rays_to_cameras(*given, SIZE, backend="cpu")
        spent.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    assert min(spent) < 0.020


def bad(**change: object) -> dict[str, object]:
    return {
        "directions": torch.zeros(1, 2, 3, 2, 3),
        "moments": torch.zeros(1, 2, 3, 2, 3),
        "image_size": (16, 24),
    } | change


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (bad(directions=torch.zeros(1, 2, 4, 2, 3)), r"directions: expected \[B,N,3,h,w\], got \[1,2,4,2,3\]"),
        (bad(moments=torch.zeros(1, 2, 3, 2, 2)), r"moments: expected \[1,2,3,2,3\] to match directions"),
        (bad(image_size=(16, 32)), r"directions: expected \[B,N,3,2,4\] for image_size \(16, 32\), got \[1,2,3,2,3\]"),
        (bad(image_size=(16, 25)), r"image_size: expected positive multiples of 8"),
        (bad(intrinsics=torch.eye(3)), r"intrinsics: expected \[1,2,3,3\] to match directions"),
    ],
)
def test_bad_arguments(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        u4d_fast.rays_to_cameras(**given)
