"""Long clips in windows: where they stand, what they are given, and that all windows make one scene."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from honest_model import HonestModel, similar, turn, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from u4d.errors import UserError
from u4d.geometry.alignment import umeyama
from u4d.geometry.cameras import rotation_angle_rad
from u4d.sample.chaining import Film, Similarity, offset
from u4d.sample.observation import parse_observation
from u4d.sample.window_plan import (
    Window,
    check_window,
    plan_windows,
    usual_overlap,
    window_observation,
    window_seed,
)
from u4d.sample.windows import complete_windows
from u4d.scene import Scene

# --- where the windows stand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_frames", "window", "overlap", "expected"),
    [
        (1, 6, 2, [(0, 1, 0, 0)]),
        (18, 18, 10, [(0, 18, 0, 0)]),
        (26, 18, 10, [(0, 18, 0, 0), (8, 26, 9, 5)]),
        (30, 18, 10, [(0, 18, 0, 0), (8, 26, 9, 5), (12, 30, 13, 9)]),  # the last is shifted back, and shares 14
        (30, 18, 6, [(0, 18, 0, 0), (12, 30, 5, 1)]),
        (30, 18, 9, [(0, 18, 0, 0), (9, 27, 5, 1), (12, 30, 13, 9)]),  # of nine frames one group is answered anew
        (10, 6, 2, [(0, 6, 0, 0), (4, 10, 1, 1)]),
        (10, 6, 1, [(0, 6, 0, 0), (4, 10, 1, 1)]),
        (11, 6, 1, [(0, 6, 0, 0), (5, 11, 1, 1)]),  # the only frame shared is kept, the last of its window or not
        (3, 2, 1, [(0, 2, 0, 0), (1, 3, 1, 1)]),
    ],
)
def test_the_plan(num_frames: int, window: int, overlap: int, expected: list[tuple[int, ...]]) -> None:
    assert plan_windows(num_frames, window, overlap) == [Window(*numbers) for numbers in expected]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 200), st.integers(2, 60), st.data())
def test_every_plan_covers_the_clip_with_full_windows(num_frames: int, window: int, data: Any) -> None:
    overlap = data.draw(st.integers(1, window - 1))
    windows = plan_windows(num_frames, window, overlap)
    assert windows[0].start == 0 and windows[-1].stop == num_frames
    assert windows[0].kept == windows[0].given == 0
    for before, after in pairwise(windows):
        assert len(before.frames) == len(after.frames) == window
        shared = before.stop - after.start
        assert shared >= overlap and (shared == overlap or after is windows[-1]) and after.start > before.start
        assert after.kept % 4 == 1 and after.given in (after.kept - 4, 1)
        assert shared == 1 or shared - 4 <= after.kept < shared  # the earlier window's last frame is answered anew
        assert after.start + after.kept <= before.stop


def test_the_usual_overlap_and_its_limits() -> None:
    assert [usual_overlap(window) for window in (2, 3, 6, 9, 10, 17, 18, 50)] == [1, 2, 2, 2, 6, 6, 10, 10]
    assert check_window(50, None, 50) == 10 and check_window(18, 4, 50) == 4
    for window, overlap, message in ((51, None, "window: expected 2 to 50"), (1, None, "window"), (18, 18, "1 to 17")):
        with pytest.raises(UserError, match=message):
            check_window(window, overlap, 50)
    with pytest.raises(ValueError, match="overlap"):
        plan_windows(30, 6, 6)


def test_the_first_window_has_the_clips_seed() -> None:
    assert window_seed(7, 0) == 7
    assert len({window_seed(seed, number) for seed in range(5) for number in range(20)}) == 100


def test_what_a_window_sees() -> None:
    asked = parse_observation("rgb:0:3,30:39 depth:24", 40)
    middle, last = Window(8, 26, kept=9, given=5), Window(22, 40, kept=1, given=1)
    assert window_observation(asked, middle).spec == "rgb:0,1,2,3,4,5,6,7,8,depth:0,1,2,3,4,camera:0,1,2,3,4"
    # frame 22 carries over the result; images 31 to 38 fill two groups, 30 is alone in its own; depth 24 is, too
    assert window_observation(asked, last).spec == "rgb:0,9,10,11,12,13,14,15,16,depth:0,camera:0"


# --- one world frame, one unit --------------------------------------------------------------------------------------

OBSERVED = ("rgb:all", "rgb:all,depth:0", "rgb:all,camera:0", "rgb:all,camera:all", "camera:all,rgb:0,-1", "rgb:0")
OBSERVED += ("rgb:all,depth:all", "rgb:all,depth:0:5,camera:0:5", "none")


def run(model: HonestModel, scene: Scene, observe: str = "rgb:all", **options: Any) -> Scene:
    return complete_windows(model, scene, observe, **({"window": 18, "overlap": 10} | options))


def assert_similar(result: Scene, truth: Scene, tolerance: float = 2e-4) -> float:
    """All poses and depths differ from the truth by one similarity; returns its scale."""
    scale, rotation, translation = umeyama(truth.cam_to_world[:, :3, 3], result.cam_to_world[:, :3, 3])
    wanted = similar(truth, float(scale), rotation, translation)
    extent = float(result.depth.median())
    torch.testing.assert_close(result.cam_to_world[:, :3, :3], wanted.cam_to_world[:, :3, :3], rtol=0, atol=tolerance)
    assert float((result.cam_to_world - wanted.cam_to_world)[:, :3, 3].abs().max()) < tolerance * extent
    torch.testing.assert_close(result.depth, wanted.depth, rtol=tolerance, atol=0)
    return float(scale)


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("observe", OBSERVED)
@pytest.mark.parametrize("overlap", [6, 9, 10, 14])
def test_all_windows_make_one_scene(observe: str, off: bool, overlap: int) -> None:
    """Also where every window answers in a frame and unit of its own: it is the first one's that holds."""
    truth = walk(75)
    model = HonestModel(truth, off=off and "camera:all" not in observe and "depth:all" not in observe)
    result = run(model, truth, observe, overlap=overlap)
    assert result.num_frames == 75 and len(model.seen) == len(plan_windows(75, 18, overlap))
    scale = assert_similar(result, truth)
    metric = "depth" in observe or "camera:all" in observe
    assert result.report["metric"] is metric
    assert scale == pytest.approx(1.0 if metric else 0.25, rel=1e-3)
    if "camera" in observe:
        torch.testing.assert_close(result.cam_to_world[0], truth.cam_to_world[0])
    else:
        torch.testing.assert_close(result.cam_to_world[0], torch.eye(4), rtol=0, atol=1e-6)


def test_the_unit_does_not_drift_over_hundreds_of_windows() -> None:
    truth = walk(900, size=(2, 2))
    model = HonestModel(truth, off=True)
    result = run(model, truth, window=10, overlap=6)
    assert len(model.seen) == 224
    assert assert_similar(result, truth, tolerance=2e-3) == pytest.approx(0.25, rel=1e-3)
    rotations = result.cam_to_world[:, :3, :3].double()
    assert float((rotations @ rotations.mT - torch.eye(3)).abs().max()) < 1e-6


@pytest.mark.parametrize("off", [False, True])
def test_the_overlap_frames_agree_exactly(off: bool) -> None:
    """What a window is given is, bit by bit, what the result holds there; and frames that are done stay."""
    truth = walk(40)
    model = HonestModel(truth, off=off)
    result = run(model, truth)
    first, second, third, _ = plan_windows(40, 18, 10)
    for window, (scene, _) in list(zip((first, second, third), model.seen, strict=False))[1:]:
        done = result.frames(range(window.start, window.start + window.kept))
        assert torch.equal(scene.rgb[: window.kept], done.rgb)
        for name in ("depth", "cam_to_world", "intrinsics"):
            assert torch.equal(getattr(scene, name)[: window.given], getattr(done, name)[: window.given]), name
    assert torch.equal(result.depth[:17], model.drawn[0].depth[:17])
    assert torch.equal(result.cam_to_world[:17], model.drawn[0].cam_to_world[:17])


def test_what_the_user_gives_stays_the_users_own() -> None:
    truth = walk(60)
    result = run(HonestModel(truth, off=True), truth, "rgb:all,camera:all,depth:0:18,30:59")
    assert torch.equal(result.cam_to_world, truth.cam_to_world)
    assert torch.equal(result.depth[:17], truth.depth[:17]) and torch.equal(result.depth[33:57], truth.depth[33:57])
    assert torch.equal(result.rgb, truth.rgb)


def test_a_window_in_which_the_user_gives_cameras_is_not_moved() -> None:
    truth = walk(60)
    film = Film.like(truth, 60)
    film.put(truth, Window(0, 60))
    window = Window(8, 26, kept=9, given=5)
    moved = similar(truth.frames(window.frames), 1.25, turn(0.1), torch.tensor([1.0, 2.0, 3.0]).double())
    nothing, depth, cameras = (parse_observation(spec, 18) for spec in ("none", "depth:9:13", "depth:9:13,camera:17"))
    whole = offset(film, moved, window, nothing)
    assert whole.scale == pytest.approx(0.8) and whole.facts["rotation_deg"] == pytest.approx(5.7296, abs=1e-3)
    back = whole.move(moved)
    torch.testing.assert_close(back.cam_to_world, truth.cam_to_world[8:26], rtol=0, atol=1e-5)
    torch.testing.assert_close(back.depth, truth.depth[8:26])
    assert offset(film, moved, window, depth).scale == 1.0
    assert offset(film, moved, window, cameras) is None
    assert offset(film, moved, Window(8, 26, kept=1, given=1), nothing) is None


def test_a_similarity_moves_points_as_it_says() -> None:
    """A pixel's world point moves by the similarity: depth and pose change together."""
    scene = walk(3)
    move = Similarity(1.7, turn(0.4, -0.2, 0.1), torch.tensor([0.5, -1.0, 2.0]).double())
    moved = move.move(scene)
    ray = torch.linalg.inv(scene.intrinsics.double()) @ torch.tensor([2.5, 6.5, 1.0]).double()

    def points(of: Scene) -> torch.Tensor:
        inside = ray * of.depth[:, 6, 2, None].double()
        pose = of.cam_to_world.double()
        return (pose[:, :3, :3] @ inside[..., None])[..., 0] + pose[:, :3, 3]

    torch.testing.assert_close(
        points(moved), 1.7 * points(scene) @ move.rotation.mT + move.translation, atol=1e-4, rtol=0
    )


# --- what the user may give -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observe", "message"),
    [
        ("rgb:all,camera:20:60", "observed camera among frames 0 to 17.*world frame.*observe them earlier"),
        ("rgb:all,depth:30:60", "frames 0 to 17.*unit of length"),
        ("rgb:all,camera:0,depth:30:60", "unit of length"),
        ("rgb:all,camera:0,59", "unit of length"),
        ("rgb:all,depth:0,camera:30:60", "world frame"),
    ],
)
def test_the_first_window_must_hold_frame_and_unit(observe: str, message: str) -> None:
    truth = walk(60)
    model = HonestModel(truth)
    with pytest.raises(UserError, match=message):
        run(model, truth, observe)
    assert not model.seen, "this is told before any work"


def test_observed_frames_that_no_window_can_use_are_told_by_their_number_in_the_clip() -> None:
    truth = walk(60)
    result = run(HonestModel(truth), truth, "rgb:0:30,41,43,depth:0")
    lost, again = result.report["notes"]
    assert lost.startswith("rgb: 3 of 32 observed frames are completed") and "(29, 41, 43)" in lost
    assert again == "the same in every window"
    assert result.report["observe"] == parse_observation("rgb:0:30,41,43,depth:0", 60).spec


def test_a_scene_without_depth_or_cameras_or_pictures_will_do() -> None:
    truth = walk(40)
    assert_similar(run(HonestModel(truth), Scene(rgb=truth.rgb)), truth)
    poses = Scene(rgb=truth.rgb, cam_to_world=truth.cam_to_world)
    assert_similar(run(HonestModel(truth), poses), truth)
    with pytest.raises(UserError, match="expected camera in the input"):
        run(HonestModel(truth), poses, "camera:all")


# --- settings and report --------------------------------------------------------------------------------------------


def test_a_clip_that_fits_is_completed_as_ever() -> None:
    truth = walk(12)
    calls: list[Any] = []

    def complete(scene: Scene, **options: Any) -> Scene:
        calls.append((scene, options))
        return scene

    result = complete_windows(complete, truth, "rgb:0", window=18, seed=5, original_size=True, steps=4)
    assert result is truth
    ((scene, options),) = calls
    assert scene is truth
    assert options == {"observe": "rgb:0", "seed": 5, "original_size": True, "progress": None, "steps": 4}


def test_settings_are_passed_on_and_every_window_has_a_seed() -> None:
    truth = walk(40)
    model = HonestModel(truth)
    bars: list[tuple[str, int, int]] = []
    run(model, truth, seed=5, steps=4, prompt="a walk", progress=lambda *bar: bars.append(bar))
    options = [given for _, given in model.seen]
    assert [o["seed"] for o in options] == [window_seed(5, k) for k in range(4)] and options[0]["seed"] == 5
    assert all(o["steps"] == 4 and o["prompt"] == "a walk" for o in options)
    assert bars == [("denoise", done, 8) for done in range(1, 9)]


def test_results_come_at_the_models_size_or_the_scenes_own() -> None:
    truth, large = walk(30), walk(30).resized((16, 32))
    result = run(HonestModel(truth), large, "rgb:all,depth:0", image_size=(8, 8))
    assert result.image_size == (8, 8)
    assert_similar(result, truth)
    result = run(HonestModel(truth), large, "rgb:all,depth:0", image_size=(8, 8), original_size=True)
    assert result.image_size == (16, 32)
    torch.testing.assert_close(result.intrinsics, large.intrinsics)


def test_the_report_of_the_whole() -> None:
    truth = walk(40)
    result = run(HonestModel(truth, off=True), truth, seed=3, spread=True)
    report = result.report
    assert report["frames"] == report["slots"] == list(range(40))
    assert (report["seed"], report["steps"], report["guidance"], report["scale"]) == (3, 3, 1.5, 0.25)
    assert result.scale == 0.25 and result.fps == truth.fps
    assert report["timings_s"] == {"denoise": 8.0, "decode": 2.0}
    assert report["notes"] == ["the same in every window"]
    assert report["best"] == 0 and report["errors"] == [report["consistency"]["reprojection_error"]]
    assert report["consistency"]["ray_residual_deg"] == 2.5 and report["consistency"]["frames_without_camera"] == 4
    assert [part["frames"] for part in report["windows"]] == [[0, 17], [8, 25], [16, 33], [22, 39]]
    assert [part["adds_from"] for part in report["windows"]] == [0, 17, 25, 31]
    assert report["windows"][0]["offset"] is None
    assert report["windows"][1]["offset"]["scale"] == pytest.approx(1 / 1.1, rel=1e-3)
    assert {"seed", "observe", "best", "errors", "consistency", "timings_s"} <= report["windows"][2].keys()
    counted = [1.0] * 17 + [2.0] * 8 + [3.0] * 6 + [4.0] * 9
    assert report["depth_spread"][:, 0, 0].tolist() == counted


# --- with the shipped weights ---------------------------------------------------------------------------------------


def steps_of(scene: Scene) -> dict[str, torch.Tensor]:
    """How far camera and depth go from each frame to the next, [N-1] each."""
    poses = scene.cam_to_world.double()
    turned = rotation_angle_rad(poses[:-1, :3, :3].mT @ poses[1:, :3, :3])
    moved = (poses[1:, :3, 3] - poses[:-1, :3, 3]).norm(dim=-1)
    nearer = (scene.depth[1:] / scene.depth[:-1]).log().flatten(1).median(1).values.abs().double()
    return {"move": moved / moved.mean(), "turn": turned, "depth": nearer}


def borders_and_latent_frames(clips: range) -> dict[str, tuple[float, float, float]]:
    """Steps of 34 frames in three windows of `tiny`, means over clips: at window borders, inside windows from one
    latent frame to the next, and the 95th percentile of all inside windows."""
    import u4d
    from u4d.data import ProceduralScenes

    pipe, scenes = u4d.Pipeline.from_pretrained("tiny"), ProceduralScenes("test", frames=34)
    windows = plan_windows(34, 18, 10)
    borders = [window.start + window.kept - 1 for window in windows[1:]]
    groups = [window.start + k for window in windows for k in (4, 8, 12) if k >= window.kept]
    assert (borders, groups) == ([16, 24], [4, 8, 12, 20, 28])
    inside = [k for k in range(33) if k not in borders]
    found = []
    for index in clips:
        rgb = scenes[index].rgb
        result = complete_windows(pipe.complete, Scene(rgb=rgb), window=18, steps=1, guidance=1.0)
        assert torch.equal(result.rgb, rgb)
        steps = steps_of(result)
        found.append({k: (v[borders].mean(), v[groups].mean(), v[inside].quantile(0.95)) for k, v in steps.items()})
    return {
        name: tuple(sum(float(clip[name][i]) for clip in found) / len(found) for i in range(3)) for name in found[0]
    }


def assert_no_seams(steps: dict[str, tuple[float, float, float]]) -> None:
    for name, (border, group, most) in steps.items():
        told = f"{name}: {border:.4f} at borders, {group:.4f} between latent frames, 95 % below {most:.4f}"
        # The first window's path is smoothed, what goes on from it is not: borders move somewhat more.
        assert border < most and border < 1.5 * group, told


def test_with_tiny_there_are_no_seams() -> None:
    """At the borders camera and depth go no further than inside windows from one latent frame to the next."""
    assert_no_seams(borders_and_latent_frames(range(2)))


@pytest.mark.slow
def test_with_tiny_the_seams_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more clips, and with the offset left in: then the camera leaps at every border."""
    matched = borders_and_latent_frames(range(6))
    assert_no_seams(matched)
    monkeypatch.setattr("u4d.sample.windows.offset", lambda *_: None)
    as_drawn = borders_and_latent_frames(range(6))
    assert all(as_drawn[name][0] > 1.5 * matched[name][0] for name in ("move", "turn", "depth"))
    with pytest.raises(AssertionError, match="move"):
        assert_no_seams(as_drawn)
