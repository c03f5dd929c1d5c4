"""The whole path: scene -> streams -> latents -> transformer -> sampler -> scene, with a small random model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import u4d
from u4d.errors import UserError
from u4d.geometry.cameras import relative_to_first, rotation_angle_rad
from u4d.geometry.smoothing import smooth_path
from u4d.sample.captured import CaptureError
from u4d.sample.observation import parse_observation

SPECS = (
    "rgb:all",
    "rgb:0,-1",
    "rgb:0",
    "camera:all,rgb:0",
    "camera:all,rgb:0,-1",
    "depth:0",
    "depth:all",
    "rgb:all,depth:all",
    "rgb:all,depth:all,camera:all",
    "none",
)


@pytest.fixture(scope="module")
def pipe(debug_checkpoint: Path) -> u4d.Pipeline:
    return u4d.Pipeline.from_pretrained(debug_checkpoint)


@pytest.fixture(scope="module")
def scene() -> u4d.Scene:
    return u4d.data.ProceduralScenes(split="test", frames=6, size=(32, 48))[5]


@pytest.mark.parametrize("spec", SPECS)
def test_every_kind_of_observation_gives_a_finite_rigid_scene(pipe: u4d.Pipeline, scene: u4d.Scene, spec: str) -> None:
    out = pipe.complete(scene, observe=spec, steps=2)
    assert out.rgb.shape == (6, 3, 32, 48) and out.depth.shape == (6, 32, 48)
    assert out.intrinsics.shape == (6, 3, 3) and out.cam_to_world.shape == (6, 4, 4)
    assert bool(torch.isfinite(out.rgb).all()) and float(out.rgb.min()) >= 0 and float(out.rgb.max()) <= 1
    assert bool(torch.isfinite(out.depth).all()) and float(out.depth.min()) > 0
    assert out.report["metric"] == ("depth" in spec or "camera" in spec)


def test_what_is_observed_comes_back_as_it_was(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    out = pipe.complete(scene, observe="rgb:0,-1 depth:0 camera:all", steps=2)
    torch.testing.assert_close(out.rgb[[0, -1]], scene.rgb[[0, -1]], rtol=0, atol=0)
    torch.testing.assert_close(out.depth[0], scene.depth[0], rtol=0, atol=0)
    torch.testing.assert_close(out.cam_to_world, scene.cam_to_world, rtol=0, atol=0)
    torch.testing.assert_close(out.intrinsics, scene.intrinsics, rtol=0, atol=0)
    assert not torch.equal(out.rgb[2], scene.rgb[2])


def test_what_is_not_observed_is_never_looked_at(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    """Frames outside the observation may hold anything: the result does not change by a bit."""
    other = u4d.data.ProceduralScenes(split="test", frames=6, size=(32, 48))[8]
    rgb = scene.rgb.clone()
    rgb[1:-1] = other.rgb[1:-1]
    mixed = u4d.Scene(rgb=rgb, depth=other.depth, intrinsics=other.intrinsics, cam_to_world=other.cam_to_world)
    one, two = (pipe.complete(given, observe="rgb:0,-1", steps=2) for given in (scene, mixed))
    for name in ("rgb", "depth", "intrinsics", "cam_to_world"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_poses_start_at_the_identity_where_no_camera_is_observed(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    out = pipe.complete(scene, steps=2)
    torch.testing.assert_close(out.cam_to_world[0], torch.eye(4), rtol=0, atol=1e-6)


def test_an_observed_camera_sets_the_world_frame(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    """Moving the observed world as a whole moves the result with it."""
    moved = torch.eye(4)
    moved[:3, :3] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    moved[:3, 3] = torch.tensor([3.0, -2.0, 5.0])
    shifted = u4d.Scene(
        rgb=scene.rgb, depth=scene.depth, intrinsics=scene.intrinsics, cam_to_world=moved @ scene.cam_to_world
    )
    one, two = (pipe.complete(given, observe="camera:0,rgb:all,depth:0", steps=2) for given in (scene, shifted))
    torch.testing.assert_close(moved @ one.cam_to_world, two.cam_to_world, rtol=1e-3, atol=1e-3)


def test_metric_input_gives_metric_output(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    """The same clip in millimetres instead of metres: every length is 1000 times as long, nothing else changes."""
    pose = scene.cam_to_world.clone()
    pose[:, :3, 3] *= 1000
    millimetres = u4d.Scene(rgb=scene.rgb, depth=scene.depth * 1000, intrinsics=scene.intrinsics, cam_to_world=pose)
    one, two = (pipe.complete(given, observe="rgb:all,depth:0", steps=2) for given in (scene, millimetres))
    torch.testing.assert_close(one.depth * 1000, two.depth, rtol=1e-3, atol=0.1)
    torch.testing.assert_close(one.cam_to_world[:, :3, 3] * 1000, two.cam_to_world[:, :3, 3], rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("size", [(32, 48), (45, 80)])
def test_any_number_of_frames_and_any_size(pipe: u4d.Pipeline, count: int, size: tuple[int, int]) -> None:
    scene = u4d.Scene(rgb=torch.rand(count, 3, *size))
    out = pipe.complete(scene, steps=1, original_size=True)
    assert out.num_frames == min(count, 6)
    assert out.image_size == size
    assert bool(torch.isfinite(out.cam_to_world).all())
    assert float(out.intrinsics[0, 0, 0]) > 0


def test_intrinsics_follow_the_image_size(pipe: u4d.Pipeline) -> None:
    scene = u4d.Scene(rgb=torch.rand(2, 3, 64, 144))
    small = pipe.complete(scene, steps=1)
    large = pipe.complete(scene, steps=1, original_size=True)
    torch.testing.assert_close(large.intrinsics[:, 0, 0], small.intrinsics[:, 0, 0] * 3)
    torch.testing.assert_close(large.intrinsics[:, 1, 1], small.intrinsics[:, 1, 1] * 2)


def test_one_image_becomes_a_clip(pipe: u4d.Pipeline) -> None:
    image = torch.rand(1, 3, 32, 48)
    out = pipe.complete(u4d.Scene(rgb=image), observe="rgb:0", frames=5, steps=1)
    assert out.num_frames == 5
    assert torch.equal(out.rgb[0], image[0])


def test_a_seed_reproduces_and_candidates_do_not_depend_on_their_number(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    one = pipe.complete(scene, steps=2, candidates=6, seed=3)
    again = pipe.complete(scene, steps=2, candidates=6, seed=3)
    few = pipe.complete(scene, steps=2, candidates=2, seed=3)
    assert torch.equal(one.depth, again.depth)
    assert one.report["errors"][:2] == pytest.approx(few.report["errors"], rel=1e-3, abs=1e-5)
    assert one.report["errors"][one.report["best"]] == one.report["consistency"]["reprojection_error"]
    assert one.report["depth_spread"].shape == (6, 32, 48)
    assert not torch.equal(one.depth, pipe.complete(scene, steps=2, seed=4).depth)


def test_halving_returns_what_the_full_search_draws_for_that_candidate(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    options = {"observe": "rgb:0,-1", "steps": 6, "seed": 3}
    full = pipe.complete(scene, candidates=5, **options)
    out = pipe.complete(scene, candidates=5, halving=True, **options)
    first, second = out.report["halving"]
    assert (first["after"], second["after"]) == (1, 2) and first["candidates"] == [0, 1, 2, 3, 4]
    assert second["candidates"] == first["kept"] and second["kept"] == [out.report["best"]] == out.report["finished"]
    assert len(first["errors"]) == 5 and len(first["overlap"]) == 5 and out.report["drawn"] == 5
    assert out.report["errors"] == pytest.approx([full.report["errors"][out.report["best"]]], rel=1e-3, abs=1e-5)
    assert "depth_spread" not in out.report and "rank" in out.report["timings_s"]
    assert full.report["finished"] == [0, 1, 2, 3, 4] and "halving" not in full.report
    two = pipe.complete(scene, candidates=5, halving=(5, 2), **options)
    assert len(two.report["errors"]) == 2 and two.report["best"] in two.report["finished"]
    assert two.report["depth_spread"].shape == (6, 32, 48)
    with pytest.raises(UserError, match="halving: expected more than 2 steps"):
        pipe.complete(scene, candidates=5, halving=True, steps=2)


def test_how_steps_were_launched_is_told(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    assert pipe.complete(scene, steps=3).report["sampler"] == "eager: it runs on the CPU"
    with pytest.raises(CaptureError, match="it runs on the CPU"):
        pipe.complete(scene, steps=3, capture=True)


def test_images_that_are_all_observed_are_not_decoded(
    pipe: u4d.Pipeline, scene: u4d.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = type(pipe.vae).decode
    monkeypatch.setattr(
        type(pipe.vae), "decode", lambda self, z, stream, n: decoded.append(stream) or decode(self, z, stream, n)
    )
    pipe.complete(scene, steps=1)
    assert decoded == ["depth"]
    pipe.complete(scene, observe="rgb:0,-1", steps=1)
    assert decoded == ["depth", "rgb", "depth"]


def test_partly_observed_groups_are_told_and_not_used(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    out = pipe.complete(scene, observe="rgb:0,2", steps=2)
    assert len(out.report["notes"]) == 1 and "1 to 4" in out.report["notes"][0]
    plain = pipe.complete(scene, observe="rgb:0", steps=2)
    assert torch.equal(out.depth, plain.depth)


def test_frames_left_out_by_sampling_are_told(pipe: u4d.Pipeline) -> None:
    out = pipe.complete(u4d.Scene(rgb=torch.rand(20, 3, 32, 48)), observe="rgb:all", steps=1)
    assert out.report["frames"] == [0, 4, 8, 11, 15, 19]
    assert any("14 of 20" in note for note in out.report["notes"])


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"observe": "rgb:77"}, "rgb:77"),
        ({"observe": "depth:all"}, "depth"),
        ({"steps": 0}, "steps"),
        ({"candidates": 0}, "candidates"),
        ({"guidance": float("nan")}, "guidance"),
        ({"frames": 7}, "frames"),
        ({"prompt": "a red ball"}, "prompt"),
    ],
)
def test_bad_settings_are_named(pipe: u4d.Pipeline, options: dict[str, object], needle: str) -> None:
    with pytest.raises(UserError, match=needle):
        pipe.complete(u4d.Scene(rgb=torch.rand(6, 3, 32, 48)), **options)


def test_rotations_are_proper(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    rotation = pipe.complete(scene, steps=2).cam_to_world[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(6, 3, 3), rtol=0, atol=1e-4)
    assert bool((torch.linalg.det(rotation) > 0).all())
    assert bool((rotation_angle_rad(rotation) >= 0).all())


def test_observed_frames_that_sampling_drops_are_an_error(pipe: u4d.Pipeline) -> None:
    with pytest.raises(UserError, match="none of the 1 observed rgb frames"):
        pipe.complete(u4d.Scene(rgb=torch.rand(20, 3, 32, 48)), observe="rgb:1", steps=1)


def test_weights_that_overflow_are_named(debug_checkpoint: Path) -> None:
    broken = u4d.Pipeline.from_pretrained(debug_checkpoint)
    with torch.no_grad():
        broken.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="checkpoint"):
        broken.complete(u4d.Scene(rgb=torch.rand(2, 3, 32, 48)), steps=1)


def test_one_camera_alone_is_no_measure(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    assert not pipe.complete(scene, observe="rgb:all,camera:0", steps=1).report["metric"]
    assert pipe.complete(scene, observe="rgb:all,camera:0,-1", steps=1).report["metric"]


def test_depth_of_unobserved_frames_leaves_no_trace(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    """Invalid pixels are filled with the farthest observed depth: a farther one in a hidden frame must not count."""
    depth = scene.depth.clone()
    depth[0, :8, :8] = 0
    farther = depth.clone()
    farther[3] *= 50
    one, two = (
        pipe.complete(
            u4d.Scene(rgb=scene.rgb, depth=given, intrinsics=scene.intrinsics, cam_to_world=scene.cam_to_world),
            observe="rgb:all,depth:0",
            steps=2,
        )
        for given in (depth, farther)
    )
    assert torch.equal(one.depth, two.depth) and torch.equal(one.cam_to_world, two.cam_to_world)


def test_a_checkpoint_recommends_settings_for_known_video_only(pipe: u4d.Pipeline, tmp_path: Path) -> None:
    assert pipe.recommended(parse_observation("rgb:all", 6)) == (40, 2.0)
    parts = (pipe.transformer, pipe.vae, pipe.scheduler)
    u4d.Pipeline(*parts, dense_steps=3, dense_guidance=1.5).save_pretrained(tmp_path / "own")
    own = u4d.Pipeline.from_pretrained(tmp_path / "own")
    assert own.recommended(parse_observation("rgb:all,camera:0", 6)) == (3, 1.5)
    assert own.recommended(parse_observation("rgb:0,-1", 6)) == (40, 2.0)


def test_predicted_paths_are_smoothed_as_the_checkpoint_recommends(
    pipe: u4d.Pipeline, scene: u4d.Scene, tmp_path: Path
) -> None:
    u4d.Pipeline(pipe.transformer, pipe.vae, pipe.scheduler, camera_smoothing=2.0).save_pretrained(tmp_path / "own")
    own = u4d.Pipeline.from_pretrained(tmp_path / "own")
    plain, smooth = pipe.complete(scene, steps=1), own.complete(scene, steps=1)
    assert (plain.report["camera_smoothing"], smooth.report["camera_smoothing"]) == (0, 2)
    expected = relative_to_first(smooth_path(plain.cam_to_world, 2.0))
    torch.testing.assert_close(smooth.cam_to_world, expected, rtol=0, atol=1e-4)
    assert (plain.cam_to_world - expected).abs().max() > 1e-2
    assert torch.equal(own.complete(scene, steps=1, camera_smoothing=0).cam_to_world, plain.cam_to_world)
    held = own.complete(scene, observe="rgb:all,camera:0", steps=1)
    assert held.report["camera_smoothing"] == 0
    assert torch.equal(held.cam_to_world, pipe.complete(scene, observe="rgb:all,camera:0", steps=1).cam_to_world)


def test_one_observed_lens_is_the_lens_of_the_clip(pipe: u4d.Pipeline, scene: u4d.Scene) -> None:
    out = pipe.complete(scene, observe="rgb:all,camera:0", steps=1)
    torch.testing.assert_close(out.intrinsics, scene.intrinsics[:1].expand(6, -1, -1), rtol=0, atol=1e-4)
    focal = scene.intrinsics.clone()
    focal[-1, 0, 0] *= 2
    out = pipe.complete(replace(scene, intrinsics=focal), observe="rgb:all,camera:0,-1", steps=1)
    assert torch.equal(out.intrinsics[[0, -1]], focal[[0, -1]])


def test_windows_complete_every_frame(pipe: u4d.Pipeline) -> None:
    long = u4d.data.ProceduralScenes(split="test", frames=15, size=(32, 48))[5]
    out = pipe.complete(long, steps=1, window=6)
    assert out.num_frames == 15 and torch.equal(out.rgb, long.rgb)
    assert bool(torch.isfinite(out.cam_to_world).all()) and len(out.report["windows"]) == 4
    with pytest.raises(UserError, match="overlap: expected it together with window"):
        pipe.complete(long, steps=1, overlap=2)
    with pytest.raises(UserError, match="window: expected 2 to 6 frames"):
        pipe.complete(long, steps=1, window=7)
