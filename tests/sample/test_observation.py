"""Observation specs: what they mean, and what is said about wrong ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from u4d.errors import UserError
from u4d.sample.observation import (
    MODALITIES,
    TASKS,
    Observation,
    check_scene_has,
    observed_groups,
    parse_observation,
    partially_observed,
)
from u4d.scene import Scene
from u4d_fast.time_layout import latent_frame_of, latent_frames


def given_frames(observation: Observation) -> dict[str, list[int]]:
    named = {name: getattr(observation, name).nonzero()[:, 0].tolist() for name in MODALITIES}
    return {name: frames for name, frames in named.items() if frames}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("rgb:all", {"rgb": list(range(10))}),
        ("rgb:0,-1", {"rgb": [0, 9]}),
        ("camera:all,rgb:0", {"camera": list(range(10)), "rgb": [0]}),
        ("rgb:0,-1,camera:2", {"rgb": [0, 9], "camera": [2]}),
        ("depth:0", {"depth": [0]}),
        ("  RGB : 0 , -1 ; depth:3  camera: all,", {"rgb": [0, 9], "depth": [3], "camera": list(range(10))}),
        ("rgb:0:3", {"rgb": [0, 1, 2]}),
        ("rgb:-3:", {"rgb": [7, 8, 9]}),
        ("rgb::2,5", {"rgb": [0, 1, 5]}),
        ("rgb:::4", {"rgb": [0, 4, 8]}),
        ("rgb:0,1:4,9", {"rgb": [0, 1, 2, 3, 9]}),
        ("rgb:3,3,-7", {"rgb": [3]}),
        ("rgb:0 rgb:1", {"rgb": [0, 1]}),
        ("", {}),
        (" none ", {}),
    ],
)
def test_specs_mean_what_they_say(spec: str, expected: dict[str, list[int]]) -> None:
    observation = parse_observation(spec, 10)
    assert given_frames(observation) == expected
    assert observation.num_frames == 10 and observation.rgb.dtype == torch.bool


@given(st.integers(1, 30).flatmap(lambda n: st.lists(st.booleans(), min_size=3 * n, max_size=3 * n)))
def test_the_text_form_reads_back_as_the_same_observation(flags: list[bool]) -> None:
    masks = torch.tensor(flags).reshape(3, -1)
    observation = Observation(*masks)
    again = parse_observation(observation.spec, masks.shape[1])
    assert all(torch.equal(getattr(again, name), getattr(observation, name)) for name in MODALITIES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rgb:77", "'rgb:77' is outside the clip: the clip has 18 frames (0 to 17)"),
        ("rgb:-19", "'rgb:-19' is outside the clip"),
        ("rgb:0:77", "'rgb:0:77' reaches outside the clip"),
        ("rgb:5:5", "'rgb:5:5' names no frame"),
        ("rgb:::0", "expected a step of at least 1"),
        ("rbg:0", "expected one of rgb, depth, camera, got 'rbg' in 'rbg:0'; did you mean 'rgb'?"),
        ("pose:all", "got 'pose' in 'pose:all'; did you mean 'camera'?"),
        ("rgb", "expected frames after 'rgb', as in 'rgb:all'"),
        ("rgb:0,depth", "expected frames after 'depth', as in 'depth:all'"),
        ("rgb:,depth:0", "expected frames after 'rgb:', as in 'rgb:all'"),
        ("all", "expected modality:frames, as in 'rgb:all' or 'rgb:0,-1', got 'all'"),
        ("rgb:first", "expected 'all', an index or a slice like 0:5, got 'rgb:first'"),
        ("rgb:0-4", "got 'rgb:0-4'; for a range write rgb:0:5"),
        ("rgb:1.5", "got 'rgb:1.5'"),
        (",", "expected modality:frames"),
    ],
)
def test_wrong_specs_are_explained_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_observation(spec, 18)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_latent_frame_is_observed_when_all_its_frames_are() -> None:
    # 11 frames: latent frames hold [0], [1..4], [5..8], [9], [10]; the fourth repeats frame 9.
    observation = parse_observation("rgb:0,1:5,9,-1 depth:5:8 camera:10", 11)
    expected = [[1, 1, 0, 1, 1], [0] * 5, [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert observed_groups(observation).int().tolist() == expected
    (note,) = partially_observed(observation)
    assert note.startswith("depth: of frames 5 to 8") and "5, 6, 7 are given and 8 are not" in note
    assert "depth:5:9" in note


@given(st.lists(st.sampled_from([True, True, False]), min_size=1, max_size=40))
def test_groups_and_notes_account_for_every_given_frame(flags: list[bool]) -> None:
    rgb, num_frames = torch.tensor(flags), len(flags)
    nothing = torch.zeros(num_frames, dtype=torch.bool)
    observation = Observation(rgb=rgb, depth=nothing, camera=nothing)
    groups = observed_groups(observation)
    owner = latent_frame_of(num_frames)
    assert groups.shape == (4, latent_frames(num_frames)) and not groups[1:].any()
    for group in range(groups.shape[1]):
        assert bool(groups[0, group]) == bool(rgb[owner == group].all())
    mixed = {int(g) for g in owner if 0 < int(rgb[owner == g].sum()) < int((owner == g).sum())}
    assert len(partially_observed(observation)) == len(mixed)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 6, 18, 50])
def test_every_task_can_be_read_and_uses_all_that_it_gives(num_frames: int) -> None:
    for name, task in TASKS.items():
        observation = parse_observation(task.observe, num_frames)
        assert partially_observed(observation) == [], name
        assert task.description and "\n" not in task.description
    ends = observed_groups(parse_observation(TASKS["sparse"].observe, num_frames))[0]
    assert bool(ends[0]) and bool(ends[-1]) and int(ends.sum()) == min(2, latent_frames(num_frames))


def test_what_is_observed_must_exist_in_the_scene() -> None:
    video = Scene(rgb=torch.zeros(3, 3, 16, 16))
    check_scene_has(parse_observation("rgb:all", 3), video)
    check_scene_has(parse_observation("none", 3), video)
    with pytest.raises(UserError, match=r"expected depth in the input because 'rgb:0,depth:0' .* a scene with rgb;"):
        check_scene_has(parse_observation("rgb:0,depth:0", 3), video)
    only_poses = Scene(rgb=video.rgb, cam_to_world=torch.eye(4).expand(3, 4, 4))
    with pytest.raises(UserError, match="expected camera"):
        check_scene_has(parse_observation("camera:all", 3), only_poses)
    with pytest.raises(UserError, match=r"one entry per frame \(3\), got 4"):
        check_scene_has(parse_observation("rgb:all", 4), video)


def test_depth_of_zeros_is_refused_where_it_is_observed() -> None:
    depth = torch.ones(3, 16, 16)
    depth[1] = 0
    scene = Scene(depth=depth)
    check_scene_has(parse_observation("depth:0,-1", 3), scene)
    with pytest.raises(UserError, match="got none in frame 1; leave it out"):
        check_scene_has(parse_observation("depth:all", 3), scene)
