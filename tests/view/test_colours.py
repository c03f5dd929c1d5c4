"""Depth colours: near is warm, equal depth is equal colour, invalid is told apart."""

from __future__ import annotations

import numpy as np
import torch

from u4d.view.colours import INVALID_COLOUR, colour_depth, disparity_range


def test_near_is_warm_and_far_is_cool() -> None:
    depth = torch.tensor([[1.0, 1.5, 4.0, 10.0]])
    near, _, _, far = colour_depth(depth, (0.1, 1.0))[0].astype(int)
    assert near[0] > near[2] + 80, "near is red"
    assert far[2] > far[0] + 60, "far is blue"


def test_colours_depend_on_depth_alone() -> None:
    first, second = torch.full((4, 4), 2.0), torch.full((4, 4), 7.0)
    second[2, 2] = 2.0
    shown = (1 / 8, 1.0)
    assert np.array_equal(colour_depth(first, shown)[0, 0], colour_depth(second, shown)[2, 2])
    assert colour_depth(torch.stack([first, second]), shown).shape == (2, 4, 4, 3)


def test_colours_are_even_in_disparity() -> None:
    """Equal steps of disparity are equal steps along the map, whatever the range; beyond its ends nothing changes."""
    disparity = torch.linspace(0.2, 1.0, 9)
    colours = colour_depth(1 / disparity, (0.2, 1.0))
    assert np.array_equal(colours, colour_depth(10 / disparity, (0.02, 0.1)))
    assert len({tuple(colour) for colour in colours}) == 9
    beyond = colour_depth(torch.tensor([0.1, 1.0, 5.0, 1000.0]), (0.2, 1.0))
    assert np.array_equal(beyond[0], beyond[1]) and np.array_equal(beyond[2], beyond[3])


def test_invalid_pixels_have_their_own_colour() -> None:
    depth = torch.tensor([0.0, torch.nan, torch.inf, -1.0, 2.0])
    colours = colour_depth(depth, (0.1, 1.0))
    assert [tuple(colour) == INVALID_COLOUR for colour in colours.tolist()] == [True, True, True, True, False]


def test_range_leaves_out_single_wild_pixels_and_invalid_ones() -> None:
    depth = torch.linspace(2, 5, 10000).reshape(1, 100, 100)
    depth[0, 0, :5] = torch.tensor([1e-4, 1e6, 0.0, torch.nan, torch.inf])
    low, high = disparity_range(depth)
    assert 1 / 5 < low < 0.21 and 0.45 < high < 1 / 2


def test_range_of_a_flat_or_empty_map_is_usable() -> None:
    for depth in (torch.full((3, 3), 2.0), torch.zeros(3, 3)):
        low, high = disparity_range(depth)
        assert 0 <= low < high
        assert colour_depth(depth, (low, high)).shape == (3, 3, 3)
