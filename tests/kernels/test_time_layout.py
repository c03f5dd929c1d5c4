"""Laws of the time layout: which frames share a latent frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from u4d_fast.time_layout import frame_groups, latent_frame_of, latent_frames

FRAMES = st.integers(1, 400)


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 1), (2, 2), (3, 3), (6, 3), (7, 4), (10, 4), (18, 6), (49, 14), (50, 14), (51, 15)]
)
def test_numbers_of_latent_frames(frames: int, latents: int) -> None:
    assert latent_frames(frames) == latents == len(frame_groups(frames))


def test_groups_written_out() -> None:
    assert frame_groups(1).tolist() == [[0, 0, 0, 0]]
    assert frame_groups(2).tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert frame_groups(8).tolist() == [[0] * 4, [1, 2, 3, 4], [5, 6, 6, 6], [7] * 4]


@given(FRAMES)
def test_every_frame_is_held_once_and_only_repeats_itself(frames: int) -> None:
    groups = frame_groups(frames)
    assert groups.flatten().unique().tolist() == list(range(frames))
    assert (groups.diff(dim=1) >= 0).all() and (groups.diff(dim=1) <= 1).all()
    owner = latent_frame_of(frames)
    for frame in range(frames):
        assert (groups == frame).any(dim=1).nonzero().flatten().tolist() == [owner[frame]]


@given(FRAMES)
def test_the_ends_stand_alone_and_nothing_inside_is_repeated_when_groups_fill(frames: int) -> None:
    groups = frame_groups(frames)
    assert set(groups[0].tolist()) == {0} and set(groups[-1].tolist()) == {frames - 1}
    if frames % 4 == 2:
        inside = groups[1:-1].flatten()
        assert torch.equal(inside, torch.arange(1, frames - 1))


@pytest.mark.parametrize("frames", [0, -3])
def test_a_clip_has_frames(frames: int) -> None:
    with pytest.raises(ValueError, match="num_frames: expected at least 1, got"):
        latent_frames(frames)
