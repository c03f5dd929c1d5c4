"""Scene: what it accepts, and sub-clips and resizing of everything together."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from example_scenes import wall_and_floor
from u4d.errors import UserError
from u4d.scene import Scene


@pytest.fixture
def scene() -> Scene:
    return wall_and_floor()


def test_holds_parts_of_any_combination(scene: Scene) -> None:
    for part in ("rgb", "depth", "intrinsics", "cam_to_world"):
        alone = Scene(**{part: getattr(scene, part)})
        assert alone.num_frames == 6
        assert getattr(alone, part).dtype == torch.float32
    assert scene.image_size == (24, 32)


def test_converts_to_float32_and_is_frozen(scene: Scene) -> None:
    assert replace(scene, cam_to_world=scene.cam_to_world.double()).cam_to_world.dtype == torch.float32
    with pytest.raises(FrozenInstanceError):
        scene.fps = 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intrinsics": torch.eye(3).repeat(5, 1, 1)}, r"intrinsics: expected \[N,3,3\] to match .*got \[5,3,3\]"),
        ({"cam_to_world": torch.eye(4)[None]}, r"cam_to_world: expected \[N,4,4\] to match .*got \[1,4,4\]"),
        ({"depth": torch.ones(6, 24, 31)}, r"depth: expected \[N,H,W\] to match rgb \[6,3,24,32\], got \[6,24,31\]"),
        ({"depth": torch.ones(6, 1, 24, 32)}, r"depth: expected \[N,H,W\] .*got \[6,1,24,32\]"),
        ({"rgb": torch.ones(6, 4, 24, 32)}, r"rgb: expected \[N,3,H,W\].*got \[6,4,24,32\]"),
        ({"rgb": torch.ones(0, 3, 24, 32)}, r"rgb: expected \[N,3,H,W\]"),
        ({"rgb": torch.full((6, 3, 24, 32), 200.0)}, r"rgb: expected values in \[0,1\], got 200 to 200"),
        ({"rgb": torch.full((6, 3, 24, 32), torch.nan)}, r"rgb: expected values in \[0,1\], got nan"),
        (
            {"rgb": torch.ones(6, 3, 24, 32, dtype=torch.uint8)},
            "rgb: expected a floating-point torch tensor, got torch.uint8",
        ),
        ({"rgb": torch.ones(6, 3, 24, 32).numpy()}, "rgb: expected a floating-point torch tensor, got ndarray"),
        (
            {"depth": torch.zeros(6, 24, 32)},
            r"depth: expected pixels with finite depth > 0, got none in any frame \(0 to 5\)",
        ),
        ({"fps": 0.0}, "fps: expected a positive number, got 0.0"),
        ({"fps": math.nan}, "fps: expected a positive number, got nan"),
        ({"scale": -1.0}, "scale: expected a positive number, got -1.0"),
    ],
)
def test_bad_input_is_named(scene: Scene, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(scene, **change)


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="expected at least one of rgb"):
        Scene()


@pytest.mark.parametrize("damage", ["scaled", "nan", "singular"])
def test_bad_cameras_name_the_frame(scene: Scene, damage: str) -> None:
    poses, intrinsics = scene.cam_to_world.clone(), scene.intrinsics.clone()
    if damage == "scaled":
        poses[3, :3, :3] *= 1.1
    elif damage == "nan":
        poses[3, 0, 3] = torch.nan
    else:
        intrinsics[3, 0, 0] = 0.0
    with pytest.raises(UserError, match="frame 3"):
        replace(scene, cam_to_world=poses, intrinsics=intrinsics)


def test_invalid_depth_is_stored_as_zero(scene: Scene) -> None:
    depth = scene.depth.clone()
    depth[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -2.0, 0.0])
    depth[4] = torch.nan
    cleaned = replace(scene, depth=depth)
    assert cleaned.depth[0, 0, :4].tolist() == [0, 0, 0, 0]
    assert torch.equal(cleaned.depth[1:4], scene.depth[1:4])
    assert cleaned.frames_without_depth == (4,)
    assert replace(scene, depth=None).frames_without_depth == (0, 1, 2, 3, 4, 5)


def test_rounding_overshoot_is_clamped(scene: Scene) -> None:
    assert float(replace(scene, rgb=scene.rgb * 0 + 1.0005).rgb.max()) == 1.0


def test_image_size_needs_a_picture(scene: Scene) -> None:
    with pytest.raises(UserError, match="cameras alone"):
        _ = Scene(cam_to_world=scene.cam_to_world).image_size


def test_frames_takes_everything_along(scene: Scene) -> None:
    part = scene.frames([4, -6, 2])
    for name in ("rgb", "depth", "intrinsics", "cam_to_world"):
        whole = getattr(scene, name)
        assert torch.equal(getattr(part, name), torch.stack([whole[4], whole[0], whole[2]]))
    assert (part.caption, part.scale, part.fps) == (scene.caption, scene.scale, scene.fps)


def test_frames_by_slice_tensor_and_frame_rate(scene: Scene) -> None:
    assert torch.equal(scene.frames(slice(1, 6, 2)).depth, scene.depth[1:6:2])
    assert scene.frames(slice(1, 6, 2)).fps == 6.0
    assert scene.frames(torch.tensor([0, 5])).fps == pytest.approx(12 / 5)
    assert scene.frames([0, 1, 3]).fps == 12.0


@pytest.mark.parametrize("indices", [[6], [-7], [], slice(9, 12)])
def test_frames_outside_the_clip(scene: Scene, indices: list[int] | slice) -> None:
    with pytest.raises(UserError, match="indices: expected frames between -6 and 5"):
        scene.frames(indices)


def test_frames_without_any_depth_have_none(scene: Scene) -> None:
    depth = scene.depth.clone()
    depth[2] = 0
    partly = replace(scene, depth=depth)
    assert partly.frames([2]).depth is None
    assert partly.frames([2, 3]).depth is not None


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 70))
def test_resizing_keeps_the_geometry(height: int, width: int) -> None:
    """The picture's corners stay on the same world rays, and no depth value is invented."""
    scene = wall_and_floor(frames=2)
    resized = scene.resized((height, width))
    assert resized.rgb.shape == (2, 3, height, width)
    assert resized.depth.shape == (2, height, width)
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        rays = []
        for one in (scene, resized):
            h, w = one.image_size
            pixel = torch.tensor([corner[0] * w, corner[1] * h, 1.0], dtype=torch.float64)
            rays.append(torch.linalg.inv(one.intrinsics[0].double()) @ pixel)
        torch.testing.assert_close(rays[0], rays[1], rtol=1e-5, atol=1e-6)
    assert set(resized.depth.flatten().tolist()) <= set(scene.depth.flatten().tolist())
    assert 0 <= float(resized.rgb.min()) <= float(resized.rgb.max()) <= 1


def test_resizing_depth_takes_the_pixel_under_the_centre(scene: Scene) -> None:
    half = scene.resized((12, 16))
    rows, columns = torch.arange(12) * 2 + 1, torch.arange(16) * 2 + 1
    assert torch.equal(half.depth, scene.depth[:, rows][:, :, columns])


def test_resizing_rgb_averages_when_shrinking() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shrunk = Scene(rgb=noise).resized((4, 4)).rgb
    blocks = torch.nn.functional.avg_pool2d(noise, 16)
    assert float((shrunk - blocks).abs().max()) < 0.06, "a filter without antialiasing is off by 0.3 and more"


def test_invalid_depth_stays_invalid_when_resized(scene: Scene) -> None:
    depth = scene.depth.clone()
    depth[:, :12] = 0
    resized = replace(scene, depth=depth).resized((48, 64))
    assert bool((resized.depth[:, :24] == 0).all())
    assert bool((resized.depth[:, 24:] > 0).all())


def test_resizing_to_the_same_size_and_to_nonsense(scene: Scene) -> None:
    assert scene.resized((24, 32)) is scene
    for size in ((0, 4), (3, -1), (2.5, 3), (4,)):
        with pytest.raises(UserError, match="size: expected"):
            scene.resized(size)
