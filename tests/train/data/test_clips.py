"""Data lanes: the same clips at the same places however many processes and workers there are, from any source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from example_scenes import wall_and_floor
from u4d.errors import UserError
from u4d.train.data.clips import ClipCounter, Lanes, batches, one_ahead, share_out
from u4d.train.data.samples import TrainingClips
from u4d.train.data.sources import ReadClips, open_sources, read_clips
from u4d.train.recipe import Data, Recipe, Source, debug_run

RECIPE = replace(debug_run(), batch=4, data=Data(window=2, draws=2))


def clips_of(
    recipe: Recipe, places: range, start: int = 0, workers: int = 0, counter: ClipCounter | None = None
) -> list[TrainingClips]:
    """What those places see at every step."""
    return list(
        batches(recipe, open_sources(recipe), places, start, workers, counter or ClipCounter(recipe.data.most_bad))
    )


def assert_equal(mine: TrainingClips, theirs: TrainingClips) -> None:
    """Two batches, bit for bit."""
    assert torch.equal(mine.numbers, theirs.numbers) and torch.equal(mine.available, theirs.available)
    for part, other in zip(mine.clips.everything(), theirs.clips.everything(), strict=True):
        assert torch.equal(part, other)


def test_a_place_sees_the_same_clips_in_any_process_and_after_resuming() -> None:
    whole = clips_of(RECIPE, range(4))
    assert len(whole) == RECIPE.steps
    for places in (range(0, 2), range(3, 4)):
        for step, part in enumerate(clips_of(RECIPE, places)):
            assert_equal(part, whole[step].pick(slice(places.start, places.stop)))
    for step, part in enumerate(clips_of(RECIPE, range(4), start=3), start=3):
        assert_equal(part, whole[step])


@pytest.mark.slow
def test_workers_change_nothing() -> None:
    for mine, theirs in zip(clips_of(RECIPE, range(4)), clips_of(RECIPE, range(4), workers=2), strict=True):
        assert_equal(mine, theirs)


def test_every_clip_of_a_window_is_used_equally_often() -> None:
    lanes = Lanes(window=8, draws=3, batch=4, seed=0)
    seen = [[lanes.position(step, place) for step in range(24)] for place in range(2)]
    for positions in seen:
        assert torch.equal(torch.bincount(torch.tensor(positions)), torch.full((8,), 3))
    assert seen[0] != seen[1] and seen[0] != [lanes.position(24 + step, 0) for step in range(24)]


def test_lanes_share_no_clip_and_leave_none_out() -> None:
    lanes = Lanes(window=3, draws=1, batch=4, seed=0)
    numbers = [number for window in range(2) for place in range(4) for number in lanes.numbers(window, place)]
    assert sorted(numbers) == list(range(24))
    assert share_out(range(2, 9), 3) == [range(2, 5), range(5, 8), range(8, 9)]
    assert share_out(range(0, 2), 5) == [range(0, 1), range(1, 2)]


def test_one_ahead_changes_nothing_but_when_things_are_made() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1, 5):
            made.append(item)
            yield item
        raise UserError("no more")

    seen = []
    with pytest.raises(UserError, match="no more"):
        for item in one_ahead(items()):
            seen.append(item)
    assert seen == made == [1, 2, 3, 4]
    assert list(one_ahead(iter([7, 8]))) == [7, 8] and list(one_ahead(iter(()))) == []


def scenes_folder(folder: Path, good: int = 3) -> Path:
    """Scenes with and without geometry, pictures alone, and files that are no clip."""
    scene = wall_and_floor(frames=6, size=(32, 48))
    for i in range(good):
        scene.save(folder / f"whole{i}", lossless=True)
    replace(scene, depth=None).save(folder / "no_depth", lossless=True)
    replace(scene, depth=None, intrinsics=None, cam_to_world=None).save(folder / "rgb_only", lossless=True)
    (folder / "poses.txt").write_text("no clip")
    (folder / ".hidden").mkdir()
    return folder


def from_folder(folder: Path, **data: object) -> Recipe:
    """The recipe with that folder as its only source."""
    return replace(RECIPE, data=replace(RECIPE.data, sources=(Source("scenes", path=str(folder)),), **data))


def test_clips_of_a_folder_come_with_whatever_they_hold(tmp_path: Path) -> None:
    recipe = from_folder(scenes_folder(tmp_path))
    sources = open_sources(recipe)
    assert [path.name for path in sources.entries[0]] == ["no_depth", "rgb_only", "whole0", "whole1", "whole2"]
    read = read_clips(sources, range(5))  # one round: every entry once
    assert read.clips is not None and not read.bad
    rgb, depth, intrinsics, cam_to_world = read.clips.clips.everything()
    assert rgb.shape == (5, 6, 3, 32, 48) and depth.shape == (5, 6, 32, 48)
    kinds = sorted(map(tuple, read.clips.available.tolist()))
    assert kinds == [(True, False, False, False), (True, False, True, True), *[(True,) * 4] * 3]
    for row, (_, has_depth, has_camera, _) in enumerate(read.clips.available.tolist()):
        assert bool((depth[row] > 0).any()) == has_depth
        assert torch.equal(cam_to_world[row], torch.eye(4).expand(6, 4, 4)) != has_camera
        assert bool(torch.isfinite(intrinsics[row]).all())
    again = read_clips(sources, range(5, 10)).clips
    assert again is not None and torch.equal(again.available.sum(0), read.clips.available.sum(0))


def test_scenes_are_resized_to_the_model(tmp_path: Path) -> None:
    wall_and_floor(frames=9, size=(48, 64)).save(tmp_path / "scene", lossless=True)
    for path in (tmp_path, tmp_path / "scene"):  # a folder of scenes, or a scene
        read = read_clips(open_sources(from_folder(path)), [7]).clips
        assert read is not None and read.clips.everything()[0].shape == (1, 6, 3, 32, 48)


def test_sources_are_drawn_by_their_weights(tmp_path: Path) -> None:
    wall_and_floor(frames=6, size=(32, 48)).save(tmp_path / "scene", lossless=True)
    sources = (Source(weight=1.0), Source("scenes", 3.0, str(tmp_path)))
    opened = open_sources(replace(RECIPE, data=replace(RECIPE.data, sources=sources)))
    drawn = [opened.source_of(number) for number in range(2000)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.75, abs=0.04)
    read = read_clips(opened, range(8)).clips
    assert read is not None and read.numbers.tolist() == list(range(8))
    pictures = read.clips.everything()[0]
    same = [torch.equal(pictures[row], pictures[drawn.index(1)]) for row in range(8)]
    assert same == [bool(source) for source in drawn[:8]]


def test_a_clip_that_can_not_be_read_is_skipped_and_counted(tmp_path: Path) -> None:
    recipe = from_folder(scenes_folder(tmp_path), most_bad=0.5)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    wall_and_floor(frames=2, size=(32, 48)).save(tmp_path / "short", lossless=True)
    sources = open_sources(recipe)
    whole = read_clips(sources, range(7))
    assert whole.clips is not None and len(whole.clips.numbers) == 7
    named = " ".join(whole.bad)
    assert "bad.mp4" in named and "short: expected pictures of at least 6 frames, got 2" in named
    for number in range(7):  # the same clip is taken whoever else is read
        alone = read_clips(sources, [number]).clips
        assert alone is not None
        assert_equal(alone, whole.clips.pick(slice(number, number + 1)))
    counter = ClipCounter(0.5)
    clips_of(recipe, range(4), counter=counter)
    assert counter.read == 8 and counter.bad > 0


def test_too_many_bad_clips_stop_the_run(tmp_path: Path) -> None:
    folder = scenes_folder(tmp_path)
    (folder / "bad.mp4").write_bytes(b"no video")
    read = read_clips(open_sources(from_folder(folder)), range(6))
    counter = ClipCounter(0.01)
    with pytest.raises(UserError, match=r"clips could not be read, at most 1.0% may .*bad\.mp4: "):
        for _ in range(20):
            counter.count(read)
    assert 48 <= counter.read + counter.bad < 60
    patient = ClipCounter(0.5)
    for _ in range(20):
        patient.count(read)


def test_a_folder_of_nothing_but_bad_clips_stops_at_once(tmp_path: Path) -> None:
    for name in ("one.mp4", "two.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    read = read_clips(open_sources(from_folder(tmp_path)), range(4))
    assert read == ReadClips(None, read.bad) and len(read.bad) == 2
    with pytest.raises(UserError, match=r"2 of 2 clips could not be read.*\.mp4"):
        ClipCounter(0.5).count(read)


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "expected a folder of scenes"), (".", "no scene, video or folder of images")]
)
def test_a_folder_without_clips_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no clip")
    with pytest.raises(UserError, match=message):
        open_sources(from_folder(tmp_path / name))


def test_numbers_beyond_the_split_are_another_world() -> None:
    sources = open_sources(RECIPE)
    read = read_clips(sources, [1_000_000, 0, 2_000_000]).clips
    assert read is not None and read.numbers.tolist() == [1_000_000, 0, 2_000_000]
    rgb = read.clips.everything()[0]
    assert not torch.equal(rgb[0], rgb[1]) and not torch.equal(rgb[0], rgb[2])
    assert_equal(read.pick(slice(1, 2)), read_clips(sources, [0]).clips)
