"""A scene's frames in the model's clip."""

from __future__ import annotations

import pytest
import torch

from u4d.errors import UserError
from u4d.sample.observation import parse_observation
from u4d.sample.placement import observed_clip, place_frames, place_observation
from u4d.scene import Scene


@pytest.mark.parametrize("available", range(1, 40))
@pytest.mark.parametrize("wanted", [None, 1, 2, 9, 18])
def test_frames_are_spread_in_order_with_both_ends(available: int, wanted: int | None) -> None:
    placed = place_frames(available, wanted, most=18)
    assert placed.num_frames == (wanted or min(available, 18))
    assert len(placed.kept) == len(placed.slots) == min(available, placed.num_frames)
    assert bool((placed.kept.diff() > 0).all()) and bool((placed.slots.diff() > 0).all())
    assert int(placed.kept[0]) == int(placed.slots[0]) == 0
    if len(placed.slots) > 1:
        assert int(placed.kept[-1]) == available - 1
        assert int(placed.slots[-1]) == placed.num_frames - 1


def test_more_frames_than_the_model_takes_are_refused() -> None:
    with pytest.raises(UserError, match="1 to 18"):
        place_frames(5, 19, most=18)


def test_a_clip_holds_what_is_observed_and_nothing_else() -> None:
    scene = Scene(rgb=0.1 + 0.9 * torch.rand(3, 3, 16, 16), depth=1 + torch.rand(3, 16, 16))
    placement = place_frames(3, 5, most=8)
    observation, notes = place_observation(parse_observation("rgb:0,1 depth:2", 3), placement)
    clip = observed_clip(scene, placement, observation, (16, 16))
    assert notes == [] and clip.cam_to_world is None and clip.intrinsics is None
    assert clip.rgb is not None and clip.depth is not None
    assert torch.equal(clip.rgb[0, [0, 2]], scene.rgb[:2])
    assert clip.rgb[0, [1, 3, 4]].abs().max() == 0
    assert torch.equal(clip.depth[0, 4], scene.depth[2])
    assert clip.depth[0, :4].abs().max() == 0
