"""What belongs to (seed, step, place) does not depend on who asks for it, or with whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from u4d.errors import UserError
from u4d.train.data.samples import (
    TrainingClips,
    cut_clips,
    draw_length,
    draw_samples,
    generator,
    hide_geometry,
    places_of,
)
from u4d.train.data.sources import open_sources, read_clips
from u4d.train.recipe import Phase, debug_run
from u4d.train.world import World

PHASE = Phase(steps=50, patterns={"joint": 1.0, "first_frames": 1.0}, frames={3: 1.0, 5: 2.0, 6: 1.0}, rgb_only=0.4)
RECIPE = replace(debug_run(), phases=(PHASE,), batch=4)


@pytest.fixture(scope="module")
def clips() -> TrainingClips:
    read = read_clips(open_sources(RECIPE), range(4)).clips
    assert read is not None
    return read


def test_a_sample_does_not_depend_on_its_neighbours(clips: TrainingClips) -> None:
    """Two processes of two places, or four micro-batches, draw what one process draws at once."""
    for step in range(5):
        whole = draw_samples(RECIPE, step, range(4), clips)
        for places in (range(0, 2), range(2, 4), range(3, 4)):
            rows = slice(places.start, places.stop)
            part, wanted = draw_samples(RECIPE, step, places, clips.pick(rows)), whole.pick(rows)
            assert part.places == wanted.places == places
            assert torch.equal(part.noise, wanted.noise)
            assert torch.equal(part.clips.available, wanted.clips.available)
            assert all(torch.equal(mine, vars(wanted.task)[name]) for name, mine in vars(part.task).items())
            for mine, theirs in zip(part.clips.clips.everything(), wanted.clips.clips.everything(), strict=True):
                assert torch.equal(mine, theirs)
        counts = sum(part.group_counts for part in whole.split(1))
        assert torch.equal(counts, whole.group_counts) and [len(part.places) for part in whole.split(3)] == [3, 1]


def test_steps_and_seeds_differ(clips: TrainingClips) -> None:
    first = draw_samples(RECIPE, 0, range(4), clips)
    other_seed = draw_samples(replace(RECIPE, seed=1), 0, range(4), clips)
    other_places = draw_samples(RECIPE, 0, range(4, 8), clips)
    assert not torch.equal(first.noise[0], first.noise[1])
    assert not torch.equal(first.noise, other_places.noise)
    assert first.noise.shape != other_seed.noise.shape or not torch.equal(first.noise, other_seed.noise)
    assert generator("lane", 1).initial_seed() != generator("sample", 1).initial_seed()


def test_lengths_come_as_often_as_the_phase_says() -> None:
    lengths = torch.tensor([draw_length(RECIPE, step, 6) for step in range(2000)])
    shares = [float((lengths == length).float().mean()) for length in (3, 5, 6)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    assert draw_length(RECIPE, 0, 2) == 2


def test_cuts_begin_anywhere_and_their_cameras_at_the_identity(clips: TrainingClips) -> None:
    rgb, depth, _, cam_to_world = clips.clips.everything()
    starts = set()
    for seed in range(30):
        own = [generator("test", seed, i) for i in range(4)]
        cut, cut_depth, _, cameras = cut_clips(clips, 3, own).clips.everything()
        for i in range(4):
            start = next(s for s in range(4) if torch.equal(rgb[i, s : s + 3], cut[i]))
            assert torch.equal(depth[i, start : start + 3], cut_depth[i])
            relative = torch.linalg.inv(cam_to_world[i, start].double()) @ cam_to_world[i, start + 1].double()
            assert torch.allclose(cameras[i, 1].double(), relative, atol=1e-5)
            starts.add(start)
        assert torch.allclose(cameras[:, 0], torch.eye(4).expand(4, 4, 4), atol=1e-6)
    assert starts == {0, 1, 2, 3}


def test_a_stretch_without_any_depth_has_no_depth_stream(clips: TrainingClips) -> None:
    _, depth, *_ = clips.clips.everything()
    holes = depth.clone()
    holes[1, :5] = float("inf")
    clips = replace(clips, clips=replace(clips.clips, depth=holes))
    seen = set()
    for seed in range(20):
        cut = cut_clips(clips, 3, [generator("test", seed, i) for i in range(4)])
        assert cut.available[[0, 2, 3]].all() and cut.available[1, [0, 2, 3]].all()
        valid = bool(torch.isfinite(cut.clips.everything()[1][1]).any())
        assert bool(cut.available[1, 1]) == valid
        seen.add(valid)
    assert seen == {True, False}


def test_geometry_is_hidden_as_often_as_asked(clips: TrainingClips) -> None:
    many = clips.pick(torch.arange(4).repeat(250))
    hidden = hide_geometry(many, 0.4, [generator("test", i) for i in range(1000)]).available
    assert hidden[:, 0].all()
    assert torch.equal(hidden[:, 1], hidden[:, 2]) and torch.equal(hidden[:, 1], hidden[:, 3])
    assert float(hidden[:, 1].float().mean()) == pytest.approx(0.6, abs=0.05)


def test_a_phase_without_a_pattern_for_a_clip_is_told(clips: TrainingClips) -> None:
    phase = replace(PHASE, patterns={"geometry_dense": 1.0}, rgb_only=1.0)
    with pytest.raises(UserError, match="no pattern of positive weight"):
        draw_samples(replace(RECIPE, phases=(phase,)), 0, range(4), clips)


def test_processes_share_the_places() -> None:
    shares = [places_of(8, World(torch.device("cpu"), rank, 4)) for rank in range(4)]
    assert shares == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    with pytest.raises(UserError, match=r"batch: expected a multiple .* \(3\), got 8"):
        places_of(8, World(torch.device("cpu"), 0, 3))
