"""The reprojection error by its definition and its laws, and its kernels against the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from warp_scenes import Clip, all_pairs, assert_no_worse, pose, rendered_clip, rotation_about

import u4d_fast.backend
from u4d_fast.ops.reprojection_error import reprojection_error
from u4d_fast.ops.warp_frames import warp_frames
from u4d_fast.reference.reprojection_error import reprojection_error as reference_reprojection_error

HostShim = Callable[[str, str], AbstractContextManager[None]]
KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", *KERNELS]


def run(clip: Clip, backend: str, occlusion: float | None = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """The op on the device of its backend; results on the CPU."""
    clip = clip.to("cuda" if backend == "cuda" else "cpu")
    error, pair_error, overlap = reprojection_error(*clip.arguments(), occlusion=occlusion, backend=backend)
    return error.cpu(), pair_error.cpu(), overlap.cpu()


# Definition and laws.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("occlusion", [0.05, None])
def test_it_is_the_masked_mean_of_what_the_warp_leaves(backend: str, occlusion: float | None) -> None:
    clip = rendered_clip(20, 30)
    error, pair_error, overlap = run(clip, backend, occlusion)
    warped, valid = warp_frames(*clip.arguments(), occlusion=occlusion)
    for b in range(2):
        for m, (_, j) in enumerate(clip.pairs.tolist()):
            mask = valid[b, m]
            left = (warped[b, m] - clip.rgb[b, j]).abs()[:, mask]
            torch.testing.assert_close(pair_error[b, m], left.mean(), rtol=1e-5, atol=1e-7)
            assert overlap[b, m] == mask.sum() / 600
    torch.testing.assert_close(error, pair_error.mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_agrees_with_itself(backend: str) -> None:
    clip = replace(rendered_clip(19, 23), pairs=torch.tensor([(0, 0), (2, 2)]))
    error, pair_error, overlap = run(clip, backend)
    assert (overlap == 1).all() and (pair_error < 1e-5).all() and (error < 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_difference_is_measured_exactly(backend: str) -> None:
    clip = rendered_clip(16, 16, frames=2, batch=1)
    rgb = torch.full_like(clip.rgb, 0.25)
    rgb[:, 1] = torch.tensor([0.35, 0.25, 0.0])[:, None, None]
    _, pair_error, _ = run(replace(clip, rgb=rgb), backend)
    torch.testing.assert_close(pair_error, torch.full((1, 2), (0.1 + 0.0 + 0.25) / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["depth * 0.9", "depth * 1.1", "rotation", "translation", "focal", "swapped poses"])
def test_the_true_geometry_scores_best(backend: str, change: str) -> None:
    clip = rendered_clip(48, 64, frames=4, batch=1)
    wrong = Clip(*(part.clone() for part in clip.arguments()))
    if change.startswith("depth"):
        wrong.depth.mul_(float(change.split()[-1]))
    elif change == "rotation":
        tilt = rotation_about("y", 0.02).float()
        wrong.cam_to_world[:, 1::2, :3, :3] = wrong.cam_to_world[:, 1::2, :3, :3] @ tilt
    elif change == "translation":
        wrong.cam_to_world[:, 1::2, 0, 3] += 0.05
    elif change == "focal":
        wrong.intrinsics[:, :, 0, 0] *= 1.1
    else:
        wrong.cam_to_world[:, [1, 2]] = clip.cam_to_world[:, [2, 1]]
    right_error, wrong_error = run(clip, backend)[0], run(wrong, backend)[0]
    assert right_error < 0.6 * wrong_error, (right_error, wrong_error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_unit_of_length_and_another_world_frame_change_nothing(backend: str) -> None:
    clip = rendered_clip(24, 32, batch=1)
    cam_to_world = clip.cam_to_world.double()
    cam_to_world[..., :3, 3] *= 4.0
    moved = pose(rotation_about("x", 1.0) @ rotation_about("z", 2.0), (30.0, -20.0, 10.0)) @ cam_to_world
    error, pair_error, overlap = run(clip, backend)
    scaled = replace(clip, depth=4.0 * clip.depth, cam_to_world=moved.float())
    for a, b, tolerance in zip((error, pair_error, overlap), run(scaled, backend), (1e-4, 1e-4, 5e-3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# Where the formula would reward showing nothing.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("why", ["turned away", "no depth", "nan camera", "singular intrinsics"])
def test_a_pair_without_a_visible_pixel_has_the_largest_error(backend: str, why: str) -> None:
    clip = rendered_clip(12, 16, frames=3, batch=1)
    before = run(clip, backend)
    if why == "turned away":
        clip.cam_to_world[:, 1, :3, :3] @= rotation_about("y", torch.pi).float()
    elif why == "no depth":
        clip.depth[:, 1] = 0
    elif why == "nan camera":
        clip.cam_to_world[:, 1, 2, 2] = float("nan")
    else:
        clip.intrinsics[:, 1, 1, 1] = 0
    error, pair_error, overlap = run(clip, backend)
    empty = (clip.pairs == 1).any(1)
    assert (pair_error[:, empty] == 1).all() and (overlap[:, empty] == 0).all()
    assert torch.equal(pair_error[:, ~empty], before[1][:, ~empty])
    assert error > before[0]
    torch.testing.assert_close(error, pair_error.mean(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_colours_that_are_not_finite_never_win(backend: str, bad: float) -> None:
    clip = rendered_clip(12, 16, frames=3, batch=2)
    before = run(clip, backend)
    clip.rgb[1, 2, 1, 6, 8] = bad
    error, pair_error, _ = run(clip, backend)
    assert torch.equal(error[0], before[0][0]) and error[1] == torch.inf
    touched = (clip.pairs == 2).any(1)
    assert not pair_error.isnan().any()
    assert (pair_error[1, touched] == torch.inf).all() and torch.equal(pair_error[1, ~touched], before[1][1, ~touched])
    assert error.argmin() == 0


# Kernels.

SHAPES = [
    (24, 32, 4, 2),
    (1, 1, 2, 1),
    (1, 7, 2, 1),
    (5, 1, 2, 2),
    (2, 2, 3, 1),
    (3, 129, 2, 1),
    (17, 256, 2, 1),
    (9, 300, 2, 1),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("occlusion", [0.05, None])
def test_kernel_is_as_exact_as_plain_torch(backend: str, shape: tuple[int, ...], occlusion: float | None) -> None:
    clip = rendered_clip(*shape)
    exact = reference_reprojection_error(*clip.to(torch.float64).arguments(), occlusion=occlusion)
    plain = reference_reprojection_error(*clip.arguments(), occlusion=occlusion)
    fast = run(clip, backend, occlusion)
    assert (exact[2] > 0).any()
    # A pixel that rounding tips over a threshold of validity changes the mean by its share.
    flips = ((fast[2] - exact[2]).abs() + (plain[2] - exact[2]).abs()) * shape[0] * shape[1]
    assert (flips <= 1.01).all()
    assert_no_worse(fast[2], plain[2], exact[2], floor=1.5 / (shape[0] * shape[1]) if flips.any() else 1e-7)
    same = flips < 0.5
    assert_no_worse(fast[1] * same, plain[1] * same, exact[1] * same, floor=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_takes_many_pairs_and_repeated_ones(backend: str) -> None:
    clip = rendered_clip(10, 12, frames=3, batch=1)
    many = replace(clip, pairs=all_pairs(3).repeat(50, 1))
    error, pair_error, overlap = run(many, backend)
    first_error, first_pair_error, first_overlap = run(clip, backend)
    assert torch.equal(pair_error, first_pair_error.repeat(1, 50)) and torch.equal(overlap, first_overlap.repeat(1, 50))
    torch.testing.assert_close(error, first_error, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_an_empty_batch_is_no_error(backend: str) -> None:
    clip = rendered_clip(6, 8, frames=2, batch=1)
    none = Clip(*(part[:0] for part in clip.arguments()[:4]), pairs=clip.pairs)
    assert [tuple(part.shape) for part in run(none, backend)] == [(0,), (0, 2), (0, 2)]


@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_takes_any_memory_layout(backend: str) -> None:
    clip = rendered_clip(12, 18, frames=3, batch=2)
    strided = replace(clip, rgb=clip.rgb.mT.contiguous().mT, depth=torch.stack((clip.depth, clip.depth), -1)[..., 0])
    assert not strided.rgb.is_contiguous() and not strided.depth.is_contiguous()
    for fast, plain in zip(run(strided, backend), run(clip, backend), strict=True):
        assert torch.equal(fast, plain)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_writes_every_element_and_repeats_itself(backend: str) -> None:
    clip = rendered_clip(21, 140, frames=3)
    first = run(clip, backend)
    torch.use_deterministic_algorithms(True)  # torch then fills new tensors, scratch too, with NaN
    try:
        second = run(clip, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_do_not_change_a_bit() -> None:
    clip = rendered_clip(31, 45, frames=3)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(run(clip, "cpu"))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_reads_nothing_outside_its_arrays(backend: str) -> None:
    clip = rendered_clip(6, 8, frames=2, batch=1)
    wild = replace(clip, pairs=torch.tensor([(0, 7), (-2, 1), (1, 0)])).to("cuda" if backend == "cuda" else "cpu")
    module = sys.modules["u4d_fast.ops.reprojection_error"]
    _, pair_error, overlap = module._kernel(*wild.arguments(), 0.05)  # past the checks, as a traced graph goes
    assert (pair_error[:, :2] == 1).all() and (overlap[:, :2] == 0).all() and overlap[0, 2] > 0


# The CUDA source on the CPU.


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("shape", [(17, 33, 3, 2), (1, 1, 2, 1), (1, 7, 2, 1), (5, 1, 2, 1)])
def test_cuda_source_agrees_with_the_cpu_kernel(host_shim: HostShim, order: str, shape: tuple[int, ...]) -> None:
    clip = rendered_clip(*shape)
    clip.depth[0, 0, 0, 0] = float("nan")
    clip = replace(clip, pairs=torch.cat((clip.pairs, torch.tensor([(0, 0), (1, 1)]))))
    expected = [run(clip, "cpu", occlusion) for occlusion in (0.05, None)]
    torch.use_deterministic_algorithms(True)  # torch then fills new tensors, scratch too, with NaN
    try:
        with host_shim("reprojection_error", order):
            results = [run(clip, "cpu", occlusion) for occlusion in (0.05, None)]
    finally:
        torch.use_deterministic_algorithms(False)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result[2], wanted[2], rtol=0, atol=0)
        for part, wanted_part in zip(result, wanted, strict=True):
            torch.testing.assert_close(part, wanted_part, rtol=1e-5, atol=1e-6)


def test_cuda_source_keeps_its_promises(host_shim: HostShim) -> None:
    """What has tests of its own above for the other backends."""
    with host_shim("reprojection_error", "forward"):
        test_a_kernel_reads_nothing_outside_its_arrays("cpu")
        test_an_empty_batch_is_no_error("cpu")
        test_colours_that_are_not_finite_never_win("cpu", float("nan"))
        test_colours_that_are_not_finite_never_win("cpu", float("inf"))
        test_a_pair_without_a_visible_pixel_has_the_largest_error("cpu", "nan camera")
        test_kernel_takes_many_pairs_and_repeated_ones("cpu")


# Torch.


def test_opcheck() -> None:
    clip = rendered_clip(8, 12, frames=2, batch=2)
    torch.library.opcheck(torch.ops.u4d_fast.reprojection_error.default, (*clip.arguments(), 0.05))


def test_registered_op_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = u4d_fast.backend.call
    monkeypatch.setattr(u4d_fast.backend, "call", lambda op, *rest: (calls.append(op), original(op, *rest)))
    torch.ops.u4d_fast.reprojection_error(*rendered_clip(8, 12).arguments(), None)
    assert calls == ["reprojection_error"]


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_compiles_into_one_graph(backend: str) -> None:
    def best(*tensors: Tensor) -> Tensor:
        return reprojection_error(*tensors, backend=backend)[0].argmin()

    clip = rendered_clip(12, 16, frames=2, batch=3)
    clip.rgb[1] = 0.5
    compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
    assert compiled(*clip.arguments()) == best(*clip.arguments()) == 1


def test_a_wanted_gradient_takes_the_reference() -> None:
    clip = rendered_clip(8, 10, frames=2, batch=1)
    depth = clip.depth.clone().requires_grad_()
    tensors = replace(clip, depth=depth).arguments()
    (grad,) = torch.autograd.grad(reprojection_error(*tensors)[0].sum(), depth)
    assert grad.norm() > 0
    with pytest.raises(u4d_fast.backend.BackendError, match="no gradient for depth"):
        reprojection_error(*tensors, backend="cpu")


def test_no_pairs_is_an_error() -> None:
    clip = rendered_clip(8, 10, frames=1, batch=1)
    with pytest.raises(ValueError, match="pairs: expected at least one pair"):
        reprojection_error(*clip.arguments())
    with pytest.raises(ValueError, match=r"depth: expected \[1,1,8,10\] to match rgb"):
        reprojection_error(*replace(clip, depth=clip.depth[..., :-1]).arguments())
