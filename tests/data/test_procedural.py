"""Procedural scenes: exact geometry against an independent distance-function oracle, determinism, and statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from u4d.clips import Clips
from u4d.data.procedural import ProceduralScenes, describe_clips, render_clips
from u4d.data.procedural.camera_paths import OVERSHOOT, path_parameter
from u4d.data.procedural.randomness import SPLITS, clip_seed, clip_streams
from u4d.data.procedural.render import ClipDescription, _trace_pixels
from u4d.data.procedural.scene_layout import BOXES, MAX_DEPTH, SPHERES

SMALL = (24, 32)
COUNT = 48


@pytest.fixture(scope="module")
def clips() -> Clips:
    return render_clips(range(COUNT), "test", size=SMALL)


@pytest.fixture(scope="module")
def described() -> ClipDescription:
    return describe_clips(range(COUNT), "test")


def world_points(clips: Clips) -> Tensor:
    """[B,N,P,3] world points of all pixel centres, float64, from the pinhole model alone."""
    height, width = clips.depth.shape[-2:]
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).reshape(-1, 3).double()
    rays = torch.einsum("bnij,pj->bnpi", torch.linalg.inv(clips.intrinsics.double()), pixels)
    local = rays * clips.depth.double().flatten(2)[..., None]
    rotation, centre = clips.cam_to_world[..., :3, :3].double(), clips.cam_to_world[..., :3, 3].double()
    return torch.einsum("bnij,bnpj->bnpi", rotation, local) + centre[:, :, None]


def project(clips: Clips, points: Tensor, frame: int) -> tuple[Tensor, Tensor]:
    """World points [B,P,3] to pixels [B,P,2] and depth [B,P] of one frame."""
    inverse = torch.linalg.inv(clips.cam_to_world[:, frame].double())
    local = torch.einsum("bij,bpj->bpi", inverse[:, :3, :3], points) + inverse[:, None, :3, 3]
    image = torch.einsum("bij,bpj->bpi", clips.intrinsics[:, frame].double(), local)
    return image[..., :2] / image[..., 2:].clamp_min(1e-6), local[..., 2]


def signed_distances(scene: ClipDescription, points: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest object (negative inside) and to the surroundings (negative outside), [B,N,P]."""
    objects, shell = scene.layout.objects, scene.layout.surroundings
    nearest = torch.full(points.shape[:-1], math.inf, dtype=torch.float64)
    for number in range(objects.centre.shape[2]):
        offset = points - objects.centre[:, :, None, number]
        local = torch.einsum("bnij,bnpi->bnpj", objects.rotation[:, :, number], offset)
        half = objects.half[:, None, None, number]
        if number < BOXES:
            excess = local.abs() - half
        elif number < BOXES + SPHERES:
            excess = (local.norm(dim=-1) - half[..., 0])[..., None]
        else:
            side = torch.hypot(local[..., 0], local[..., 2]) - half[..., 0]
            excess = torch.stack([side, local[..., 1].abs() - half[..., 1]], dim=-1)
        distance = excess.clamp_min(0.0).norm(dim=-1) + excess.amax(-1).clamp_max(0.0)
        nearest = torch.minimum(nearest, distance)
    low, high = shell.low[:, None, None], shell.high[:, None, None]
    walls = torch.minimum(points - low, high - points).amin(-1)
    sky = shell.sky_radius[:, None, None] - (points - scene.layout.camera_centre[:, :1, None]).norm(dim=-1)
    return nearest, torch.minimum(walls, sky)


def test_every_pixel_lies_on_a_surface(clips: Clips, described: ClipDescription) -> None:
    """Holds for moving things too: poses are those of the frame."""
    near, surroundings = signed_distances(described, world_points(clips))
    tolerance = 1e-4 * clips.depth.double().flatten(2).clamp_min(1.0)
    assert (torch.minimum(near.abs(), surroundings.abs()) < tolerance).all()


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.7, 0.9, 0.99])
def test_nothing_hides_between_camera_and_surface(clips: Clips, described: ClipDescription, fraction: float) -> None:
    eye = clips.cam_to_world[:, :, None, :3, 3].double()
    points = eye + fraction * (world_points(clips) - eye)
    near, surroundings = signed_distances(described, points)
    tolerance = 1e-4 * clips.depth.double().flatten(2).clamp_min(1.0)
    assert (near > -tolerance).all()
    assert (surroundings > -tolerance).all()


def test_colours_follow_the_true_geometry_and_no_other() -> None:
    """A static scene warped by its true depth and cameras looks the same; with depth 15 % off it does not."""
    scene = describe_clips(range(24), "val")
    static = [i for i in range(24) if not scene.layout.objects.moving[i].any()][:8]
    clips = render_clips(static, "val", frames=18, size=(48, 64))
    source, target, errors = 12, 0, {}
    for factor in (1.0, 0.85, 1.15):
        pixel, depth = project(clips, world_points(replace(clips, depth=clips.depth * factor))[:, target], source)
        grid = (pixel / torch.tensor([32.0, 24.0]) - 1.0).float()[:, None]
        colour = torch.nn.functional.grid_sample(clips.rgb[:, source], grid, align_corners=False)[:, :, 0]
        if factor == 1.0:  # visible in both frames, by the true geometry
            behind = clips.depth[:, source, None]
            seen = torch.nn.functional.grid_sample(behind, grid, mode="nearest", align_corners=False)[:, 0, 0]
            inside = (pixel > 0.5).all(-1) & (pixel < torch.tensor([63.5, 47.5])).all(-1) & (depth > 0.05)
            visible = inside & ((seen - depth).abs() < 0.03 * depth)
            assert visible.double().mean() > 0.4
        error = (colour - clips.rgb[:, target].flatten(2)).abs().mean(1)
        errors[factor] = float(error[visible].mean())
    assert errors[1.0] < 0.03
    assert errors[0.85] > 1.5 * errors[1.0]
    assert errors[1.15] > 1.5 * errors[1.0]


def test_values_are_in_range(clips: Clips) -> None:
    assert all(torch.isfinite(field).all() and field.dtype == torch.float32 for field in clips.everything())
    assert clips.rgb.min() >= 0.0
    assert clips.rgb.max() <= 1.0
    assert clips.depth.min() > 0.02
    assert clips.depth.max() <= MAX_DEPTH


def test_cameras_are_rigid_and_intrinsics_fit(clips: Clips) -> None:
    rotation = clips.cam_to_world[..., :3, :3].double()
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand_as(rotation), atol=1e-6)
    assert (torch.linalg.det(rotation) > 0.999).all()
    assert torch.equal(clips.cam_to_world[..., 3, :], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(COUNT, 18, 4))
    assert (clips.intrinsics[..., 2, :] == torch.tensor([0.0, 0.0, 1.0])).all()
    height, width = SMALL
    offset = (clips.intrinsics[:, 0, :2, 2] / torch.tensor([width, height]) - 0.5).abs()
    assert offset.max() <= 0.04 + 1e-6
    assert 0.3 < (offset.amax(-1) == 0).double().mean() < 0.9


def test_same_index_gives_the_same_clip_whatever_the_batch() -> None:
    together = render_clips([5, 3, 11], frames=4, size=SMALL)
    for row, index in enumerate([5, 3, 11]):
        alone = render_clips([index], frames=4, size=SMALL)
        for batched, single in zip(together.everything(), alone.everything(), strict=True):
            torch.testing.assert_close(batched[row], single[0], rtol=0, atol=1e-5)


def test_short_clip_is_the_beginning_of_a_long_one() -> None:
    long, short = render_clips([8], frames=10, size=SMALL), render_clips([8], frames=5, size=SMALL)
    assert torch.equal(long.cam_to_world[:, :5], short.cam_to_world)
    assert torch.equal(long.intrinsics[:, :5], short.intrinsics)
    same = (long.rgb[:, :5] - short.rgb).abs() < 1e-4  # another chunk size may flip a ray that grazes an edge
    assert same.double().mean() > 0.999


def test_clips_of_splits_seeds_and_indices_differ() -> None:
    def picture(index: int, split: str, seed: int) -> Tensor:
        return render_clips([index], split, frames=1, size=SMALL, seed=seed).rgb

    reference = picture(4, "train", 0)
    for other in (picture(4, "val", 0), picture(4, "test", 0), picture(4, "train", 1), picture(5, "train", 0)):
        assert (reference - other).abs().mean() > 0.02


def test_seeds_never_collide() -> None:
    seen = {split: {clip_seed(split, 0, i) for i in range(1000)} for split in SPLITS}
    assert all(len(seeds) == 1000 for seeds in seen.values())
    other_world = {clip_seed("train", 7, i) for i in range(1000)}
    assert not other_world & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    assert max(max(seeds) for seeds in seen.values()) < 2**32


def test_random_stream_is_pinned() -> None:
    """Guards the promise that an index means the same scene on every machine and in every release."""
    (stream,) = clip_streams("test", 0, [3], [4])
    expected = torch.rand(4, generator=torch.Generator().manual_seed(clip_seed("test", 0, 3)), dtype=torch.float64)
    assert torch.equal(stream.uniform(4)[0], expected)
    assert clip_seed("test", 0, 3) == PINNED_SEED


PINNED_SEED = 2481128302


def rotation_deg(clips: Clips) -> Tensor:
    relative = clips.cam_to_world[:, 0, :3, :3].double().mT @ clips.cam_to_world[:, -1, :3, :3].double()
    trace = relative.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.acos(((trace - 1.0) / 2.0).clamp(-1.0, 1.0)))


def test_motion_depth_and_lens_statistics(clips: Clips) -> None:
    median = clips.depth[:, 0].flatten(1).median(dim=1).values
    assert 2.0 < median.median() < 6.0
    assert ((median > 0.6) & (median < 16.0)).double().mean() > 0.95
    assert median.max() / median.min() > 4.0

    angle = rotation_deg(clips)
    assert 6.0 < angle.mean() < 12.0
    assert angle.max() < 45.0
    assert angle.std() > 4.0
    assert (angle < 3.0).any()

    travel = (clips.cam_to_world[:, -1, :3, 3] - clips.cam_to_world[:, 0, :3, 3]).norm(dim=-1) / median
    assert travel.max() < 2.5
    assert 0.12 < travel.median() < 0.4
    assert travel.min() < 0.06

    fov = torch.rad2deg(2.0 * torch.atan(SMALL[1] / 2.0 / clips.intrinsics[..., 0, 0]))
    assert fov.min() >= 35.0 - 1e-3
    assert fov.max() <= 100.0 + 1e-3
    assert fov[:, 0].std() > 8.0
    zooming = ((fov - fov[:, :1]).abs().amax(1) > 0.05).double().mean()
    assert 0.0 < zooming < 0.3
    aspect = clips.intrinsics[:, 0, 0, 0] / clips.intrinsics[:, 0, 1, 1]
    assert 0.5 < ((aspect - 1.0).abs() < 1e-5).double().mean() < 0.9
    assert 0.75 - 1e-4 < aspect.min() < 0.95
    assert 1.05 < aspect.max() < 1.35 + 1e-4


def test_neighbouring_frames_move_a_few_pixels(clips: Clips) -> None:
    points = world_points(clips)
    flows = []
    for frame in (0, 8, 16):
        here, _ = project(clips, points[:, frame], frame)
        there, depth = project(clips, points[:, frame], frame + 1)
        flow = (there - here).norm(dim=-1) * (128 / SMALL[1])
        flows.append(flow[depth > 0.05])
    flow = torch.cat(flows)
    assert (flow < 3.0).double().mean() > 0.75
    assert flow.median() > 0.4


def test_pictures_are_textured_nearly_everywhere(clips: Clips) -> None:
    picture = clips.rgb[:, 0]
    step = (picture[..., 1:] - picture[..., :-1]).abs().mean(1)
    assert step.mean(dim=(1, 2)).min() > 0.008
    assert step.mean() > 0.02
    patches = torch.nn.functional.unfold(picture.mean(1, keepdim=True), kernel_size=8, stride=8)
    assert (patches.std(dim=1) < 0.008).double().mean() < 0.08


def test_some_scenes_move_and_the_rest_is_still(described: ClipDescription) -> None:
    objects = described.layout.objects
    moving = objects.moving.any(-1)
    assert 0.15 < moving.double().mean() < 0.65
    shift = (objects.centre[:, 9] - objects.centre[:, 0]).norm(dim=-1)
    turn = (objects.rotation[:, 9] - objects.rotation[:, 0]).norm(dim=(-1, -2))
    changed = (shift > 1e-6) | (turn > 1e-6)
    assert not changed[~objects.moving].any()
    assert changed[objects.moving].double().mean() > 0.95
    assert objects.active.sum(-1).min() >= 1


def test_cameras_stay_in_free_space_even_in_long_clips() -> None:
    scene = describe_clips(range(150), "train", frames=90)
    eyes = scene.layout.camera_centre[:, :, None]
    near, surroundings = signed_distances(scene, eyes)
    typical = scene.layout.scale[:, None, None]
    assert (near / typical).min() > 0.05
    assert (surroundings / typical).min() > 0.05


def test_path_parameter_counts_frames_then_turns_softly() -> None:
    frame = torch.arange(400, dtype=torch.float64)
    e = path_parameter(frame)
    torch.testing.assert_close(e[:18], frame[:18] / 17.0)
    assert e.max() <= 1.0 + OVERSHOOT
    assert e.min() >= -OVERSHOOT
    speed, bend = e.diff(), e.diff().diff()
    assert speed.abs().max() <= 1.0 / 17.0 + 1e-9
    assert bend.abs().max() < 0.5 / 17.0


def test_tracer_is_one_graph_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = torch.compile(_trace_pixels, backend="eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr("u4d.data.procedural.render._compiled_tracer", lambda: traced)
    compiled = render_clips([2], frames=2, size=(8, 16), compile=True)
    plain = render_clips([2], frames=2, size=(8, 16))
    torch.testing.assert_close(compiled.rgb, plain.rgb, rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled.depth, plain.depth)


def test_data_set_yields_scenes_equal_to_the_batched_path() -> None:
    scenes = ProceduralScenes("val", frames=3, size=SMALL, seed=2)
    assert len(scenes) == 1000
    assert len(ProceduralScenes("train")) == 1_000_000
    scene = scenes[7]
    clip = render_clips([7], "val", frames=3, size=SMALL, seed=2)
    for name in vars(clip):
        assert torch.equal(getattr(scene, name), getattr(clip, name)[0])
    assert torch.equal(scenes[-1].depth, scenes[999].depth)


def test_wrong_requests_are_told_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"split: expected one of train, val, test, got 'dev'"):
        ProceduralScenes("dev")
    with pytest.raises(ValueError, match="frames"):
        ProceduralScenes("train", frames=0)
    with pytest.raises(IndexError, match=r"index: expected -1000\.\.999"):
        ProceduralScenes("test")[1000]
    with pytest.raises(ValueError, match=r"index: expected 0\.\.999 in split 'test', got 1000"):
        render_clips([1000], "test", frames=1, size=SMALL)
    with pytest.raises(ValueError, match="frames: expected at least 1, got 0"):
        render_clips([0], frames=0)
    with pytest.raises(ValueError, match="indices"):
        render_clips([])
