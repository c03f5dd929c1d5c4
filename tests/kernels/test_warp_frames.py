"""The warp by its laws, what it calls valid, and how it behaves inside torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from warp_scenes import (
    Clip,
    all_pairs,
    flat_clip,
    pinhole,
    pixel_grid,
    pose,
    random_clip,
    rendered_clip,
    rotation_about,
    sample_by_torch,
    warp_on,
)

import u4d_fast.backend
from u4d_fast import warp_frames

KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", *KERNELS]


# Laws.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_maps_onto_itself(backend: str) -> None:
    clip = random_clip(19, 37, frames=3)
    far = replace(clip, cam_to_world=clip.cam_to_world.clone(), pairs=torch.tensor([(0, 0), (1, 1), (2, 2)]))
    far.cam_to_world[..., :3, 3] += torch.tensor([300.0, -200.0, 100.0])
    for case in (replace(clip, pairs=far.pairs), far):
        warped, valid = warp_on(case, backend)
        assert valid.all()
        torch.testing.assert_close(warped, case.rgb, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [(3, 0), (0, -2), (-4, 5)])
def test_sideways_motion_before_a_flat_wall_shifts_pixels(backend: str, shift: tuple[int, int]) -> None:
    height, width, focal, distance = 17, 23, 20.0, 2.0
    rgb = torch.rand(1, 2, 3, height, width, generator=torch.Generator().manual_seed(1))
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]).expand(1, 2, 3, 3)
    # Camera i stands where a point moves by (+dx, +dy) pixels between j and i.
    dx, dy = shift
    i = pose(torch.eye(3).double(), (-dx * distance / focal, -dy * distance / focal, 0.0))
    cam_to_world = torch.stack((i, torch.eye(4).double()))[None].float()
    clip = Clip(rgb, torch.full((1, 2, height, width), distance), intrinsics, cam_to_world, torch.tensor([(0, 1)]))
    warped, valid = warp_on(clip, backend)
    expected = torch.zeros(height, width, dtype=torch.bool)
    expected[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)] = True
    assert torch.equal(valid[0, 0], expected)
    shifted = torch.roll(rgb[0, 0], (-dy, -dx), (1, 2))
    torch.testing.assert_close(warped[0, 0], shifted * expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_alone_is_a_homography_whatever_the_depth(backend: str) -> None:
    clip = rendered_clip(30, 40, frames=2, batch=1)
    cam_to_world = torch.stack((pose(rotation_about("y", 0.1) @ rotation_about("z", 0.2), (0, 0, 0)), torch.eye(4)))
    clip = replace(clip, cam_to_world=cam_to_world[None].float(), pairs=torch.tensor([(0, 1)]))
    near, valid = warp_on(clip, backend, occlusion=None)
    far, far_valid = warp_on(replace(clip, depth=7 * clip.depth + 1), backend, occlusion=None)
    both = valid & far_valid
    assert (valid != far_valid).float().mean() < 0.01 and both.float().mean() > 0.4
    torch.testing.assert_close(near * both[:, :, None], far * both[:, :, None], rtol=0, atol=1e-4)
    # The same by OpenCV's definition: x_i ~ K_i R_i^T R_j K_j^-1 x_j, sampled by torch.
    k = clip.intrinsics[0].double()
    homography = k[0] @ cam_to_world[0, :3, :3].T @ torch.linalg.inv(k[1])
    sampled = sample_by_torch(clip.rgb[0, 0].double(), homography @ pixel_grid(30, 40))
    torch.testing.assert_close(near[0, 0] * both[0, 0], (sampled * both[0, 0]).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rendered_view_is_found_again_in_the_others(backend: str) -> None:
    clip = rendered_clip(60, 80)
    warped, valid = warp_on(clip, backend)
    error = (warped - clip.rgb[:, clip.pairs[:, 1]]).abs().mean(2)[valid]
    assert valid.float().mean() > 0.6
    # Interpolation of a smooth texture; a ball edge between two taps mixes colours at few pixels.
    assert error.median() < 2e-3 and error.mean() < 6e-3
    unmoved = (clip.rgb[:, clip.pairs[:, 0]] - clip.rgb[:, clip.pairs[:, 1]]).abs().mean()
    assert unmoved > 20 * error.mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_frame_keeps_its_place_in_the_batch(backend: str) -> None:
    clip = random_clip(9, 14, frames=3, batch=3)
    warped, valid = warp_on(clip, backend)
    for b in range(3):
        alone = Clip(*(part[b : b + 1] for part in clip.arguments()[:4]), pairs=clip.pairs)
        one, one_valid = warp_on(alone, backend)
        assert torch.equal(warped[b : b + 1], one) and torch.equal(valid[b : b + 1], one_valid)
    for m, pair in enumerate(clip.pairs):
        one, one_valid = warp_on(replace(clip, pairs=pair[None]), backend)
        assert torch.equal(warped[:, m : m + 1], one) and torch.equal(valid[:, m : m + 1], one_valid)


# What is valid.


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_occlusion_tolerance_is_relative_and_one_sided(backend: str) -> None:
    assert warp_on(flat_clip(2.0, 2.09), backend)[1].all()
    assert not warp_on(flat_clip(2.0, 2.11), backend)[1].any()
    assert warp_on(flat_clip(2.0, 0.5), backend)[1].all()  # nearer than the surface of i: not hidden
    assert warp_on(flat_clip(200.0, 209.0), backend)[1].all()
    assert warp_on(flat_clip(2.0, 2.11), backend, occlusion=0.06)[1].all()
    assert not warp_on(flat_clip(2.0, 2.01), backend, occlusion=0.0)[1].any()
    assert warp_on(flat_clip(2.0, 99.0), backend, occlusion=None)[1].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_near_object_hides_is_not_valid(backend: str) -> None:
    height, width, focal = 20, 40, 40.0
    near, far, baseline = 2.0, 8.0, 0.5
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]).expand(1, 2, 3, 3)
    cam_to_world = torch.eye(4).repeat(1, 2, 1, 1)
    cam_to_world[0, 0, 0, 3] = (
        baseline  # i is to the right: near things shift 10 pixels to the left in it, far ones 2.5
    )
    depth = torch.full((1, 2, height, width), far)
    depth[0, 1, :, 20:28] = near
    depth[0, 0, :, 10:18] = near
    rgb = torch.rand(1, 2, 3, height, width, generator=torch.Generator().manual_seed(2))
    clip = Clip(rgb, depth, intrinsics, cam_to_world, torch.tensor([(0, 1)]))
    _, valid = warp_on(clip, backend)
    columns = valid[0, 0].all(0)
    assert torch.equal(columns, valid[0, 0].any(0))
    # Column c of the far wall (centre c + .5) lands at c - 2, between two pixels of i; those in [10, 18) are hidden.
    assert not columns[13:20].any()  # lands inside the near object of i, which stands before it
    assert columns[20:28].all()  # the object itself
    assert columns[29:].all() and columns[3:12].all()
    assert not columns[:2].any()  # outside i
    assert warp_on(clip, backend, occlusion=None)[1][0, 0, :, 3:].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_invalid_depth_shows_nothing_on_either_side(backend: str, bad: float) -> None:
    clip = flat_clip(2.0, 2.0)
    clip.depth[0, 1, 3, 4] = bad
    clip.depth[0, 0, 5, 6] = bad
    warped, valid = warp_on(clip, backend)
    expected = torch.ones(8, 11, dtype=torch.bool)
    expected[3, 4] = expected[5, 6] = False
    assert torch.equal(valid[0, 0], expected)
    assert warped.isfinite().all() and (warped[0, 0][:, ~expected] == 0).all()
    expected[5, 6] = True  # without the test, the depth of i is not asked
    assert torch.equal(warp_on(clip, backend, occlusion=None)[1][0, 0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_behind_the_camera_is_not_valid(backend: str) -> None:
    clip = random_clip(10, 12)
    clip.cam_to_world[0, 0, :3, :3] = (rotation_about("y", torch.pi) @ clip.cam_to_world[0, 1, :3, :3].double()).float()
    clip.cam_to_world[0, 0, :3, 3] = clip.cam_to_world[0, 1, :3, 3]
    _, valid = warp_on(replace(clip, pairs=torch.tensor([(0, 1)])), backend, occlusion=None)
    assert not valid.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["singular intrinsics", "nan pose", "zero rotation"])
def test_a_broken_camera_sees_nothing_and_spoils_nothing_else(backend: str, what: str) -> None:
    clip = random_clip(7, 9, frames=3)
    clean, clean_valid = warp_on(clip, backend)
    if what == "singular intrinsics":
        clip.intrinsics[:, 1, 0, 0] = 0
    elif what == "nan pose":
        clip.cam_to_world[:, 1, 0, 3] = float("nan")
    else:
        clip.cam_to_world[:, 1, :3, :3] = 0
    warped, valid = warp_on(clip, backend)
    broken = (clip.pairs == 1).any(1)
    assert not valid[:, broken].any() and (warped[:, broken] == 0).all()
    assert torch.equal(warped[:, ~broken], clean[:, ~broken]) and torch.equal(
        valid[:, ~broken], clean_valid[:, ~broken]
    )


# Torch.


def sample_inputs(requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    clip = rendered_clip(8, 12, frames=2, batch=2)
    rgb, depth = clip.rgb.requires_grad_(requires_grad), clip.depth.requires_grad_(requires_grad)
    return rgb, depth, clip.intrinsics, clip.cam_to_world, clip.pairs, 0.05


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.u4d_fast.warp_frames.default, sample_inputs())
    rgb, depth, *rest = sample_inputs(requires_grad=False)
    grad = torch.rand(2, 2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.u4d_fast.warp_frames_rgb_grad.default, (grad, depth, *rest))
    torch.library.opcheck(torch.ops.u4d_fast.warp_frames_depth_grad.default, (grad, rgb, depth, *rest))


def test_registered_op_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = u4d_fast.backend.call
    monkeypatch.setattr(u4d_fast.backend, "call", lambda op, *rest: (calls.append(op), original(op, *rest)))
    inputs = sample_inputs()
    torch.ops.u4d_fast.warp_frames(*inputs)[0].sum().backward()
    assert calls == ["warp_frames", "warp_frames_rgb_grad", "warp_frames_depth_grad"]


def test_registered_op_falls_back_to_the_reference_with_gradients() -> None:
    fast_inputs, plain_inputs = sample_inputs(), sample_inputs()
    torch.ops.u4d_fast.warp_frames(*fast_inputs)[0].square().sum().backward()
    with u4d_fast.backend.use_backend("reference"):
        torch.ops.u4d_fast.warp_frames(*plain_inputs)[0].square().sum().backward()
    for fast, plain in zip(fast_inputs[:2], plain_inputs[:2], strict=True):
        torch.testing.assert_close(fast.grad, plain.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_compiles_into_one_graph(backend: str) -> None:
    def loss(rgb: Tensor, depth: Tensor, *rest: Tensor) -> Tensor:
        warped, valid = warp_frames(rgb, depth, *rest, backend=backend)
        return (warped * valid[:, :, None]).square().sum()

    eager, traced = sample_inputs()[:5], sample_inputs()[:5]
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*traced).backward()
    for a, b in zip(eager[:2], traced[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_exports() -> None:
    class Warp(torch.nn.Module):
        def forward(self, *clip: Tensor) -> tuple[Tensor, Tensor]:
            return warp_frames(*clip)

    inputs = sample_inputs(requires_grad=False)[:5]
    program = torch.export.export(Warp(), inputs)
    assert "u4d_fast.warp_frames" in program.graph_module.code
    for saved, direct in zip(program.module()(*inputs), warp_frames(*inputs), strict=True):
        assert torch.equal(saved, direct)


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    clip = random_clip(64, 96, frames=3).to("cuda")
    expected = warp_frames(*clip.arguments())[0]
    stream = torch.cuda.Stream()
    blocked = clip.rgb.clone()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = blocked.mul_(1)
        warped = warp_frames(late, *clip.arguments()[1:])[0]
    stream.synchronize()
    assert torch.equal(warped, expected)


# Arguments.


def test_half_precision_is_computed_in_float32() -> None:
    clip = rendered_clip(8, 10, frames=2, batch=1)
    warped, _ = warp_frames(clip.rgb.bfloat16(), *clip.arguments()[1:])
    assert warped.dtype == torch.float32
    assert torch.equal(warped, warp_frames(clip.rgb.bfloat16().float(), *clip.arguments()[1:])[0])


def test_float64_goes_to_the_reference() -> None:
    clip = rendered_clip(8, 10, frames=2, batch=1).to(torch.float64)
    assert warp_frames(*clip.arguments())[0].dtype == torch.float64
    with pytest.raises(u4d_fast.backend.BackendError, match="float32"):
        warp_frames(*clip.arguments(), backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rgb": torch.zeros(1, 2, 4, 8, 10)}, r"rgb: expected \[B,N,3,H,W\], got \[1,2,4,8,10\]"),
        ({"depth": torch.zeros(1, 2, 8, 9)}, r"depth: expected \[1,2,8,10\] to match rgb"),
        ({"intrinsics": torch.zeros(1, 3, 3, 3)}, r"intrinsics: expected \[1,2,3,3\] to match rgb"),
        ({"cam_to_world": torch.zeros(1, 2, 3, 4)}, r"cam_to_world: expected \[1,2,4,4\] to match rgb"),
        ({"pairs": torch.zeros(2, 3, dtype=torch.int64)}, r"pairs: expected \[M,2\], got \[2,3\]"),
        ({"pairs": torch.tensor([(0, 2)])}, r"pairs: expected frame indices 0..1 .* got 2"),
        ({"pairs": torch.tensor([(-1, 0)])}, r"pairs: expected frame indices 0..1 .* got -1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    clip = rendered_clip(8, 10, frames=2, batch=1)
    with pytest.raises(ValueError, match=message):
        warp_frames(*replace(clip, **change).arguments())


def test_wrong_dtypes_and_tolerances_are_named() -> None:
    clip = rendered_clip(8, 10, frames=2, batch=1)
    with pytest.raises(TypeError, match="pairs: expected int64"):
        warp_frames(*replace(clip, pairs=clip.pairs.int()).arguments())
    with pytest.raises(TypeError, match=r"rgb: expected a floating dtype, got torch\.uint8"):
        warp_frames(*replace(clip, rgb=clip.rgb.byte()).arguments())
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="occlusion: expected"):
            warp_frames(*clip.arguments(), occlusion=wrong)


def test_all_pairs_are_ordered() -> None:
    assert all_pairs(3).tolist() == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    assert torch.equal(pinhole(10, 4, 6)[2], torch.tensor([0.0, 0.0, 1.0]).double())
