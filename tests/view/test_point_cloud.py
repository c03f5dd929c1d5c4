"""Which pixels become points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from example_scenes import wall_and_floor
from u4d.errors import UserError
from u4d.view.point_cloud import FAR_MEDIANS, scene_points, surface_mask


def slanted(height: int = 30, width: int = 40) -> torch.Tensor:
    """Depth of a plane seen at a slant: disparity grows linearly from row to row."""
    disparity = 0.2 + 0.012 * torch.arange(height)[:, None] + 0.002 * torch.arange(width)
    return 1 / disparity


def test_a_slanted_plane_is_kept_whole() -> None:
    assert bool(surface_mask(slanted()).all())


def test_edges_are_left_out_on_both_sides() -> None:
    depth = slanted()
    depth[:, 20:] /= 2
    mask = surface_mask(depth)
    assert not bool(mask[:, 19:21].any())
    assert bool(mask[:, :19].all()) and bool(mask[:, 21:].all())


def test_smeared_edges_are_left_out() -> None:
    """A decoder smears an edge over pixels; those between the surfaces must go too."""
    depth = torch.full((9, 30), 2.0)
    depth[:, 15:] = 5.0
    depth = torch.nn.functional.avg_pool1d(depth[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
    between = (depth > 2.05) & (depth < 4.9)
    assert bool(between.any())
    assert not bool((surface_mask(depth) & between).any())


def test_invalid_pixels_and_their_neighbours_are_left_out() -> None:
    depth = slanted()
    depth[10, 10], depth[20, 20] = 0, torch.nan
    mask = surface_mask(depth)
    gone = {(int(r), int(c)) for r, c in (~mask).nonzero()}
    cross = {(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)}
    assert gone == {(r + dr, r + dc) for r in (10, 20) for dr, dc in cross}


def test_maps_of_one_pixel_or_row() -> None:
    for shape in ((1, 1), (1, 7), (7, 1), (2, 2)):
        assert bool(surface_mask(torch.full(shape, 3.0)).all())


def test_subsampling_is_fair_and_reproducible() -> None:
    scene = wall_and_floor(frames=4, size=(40, 60))
    everything, _ = scene_points(scene, 10**6)
    some, colours = scene_points(scene, 1000)
    again, _ = scene_points(scene, 1000)
    assert len(some) == len(colours) == 1000 and np.array_equal(some, again)
    assert {tuple(p) for p in some.tolist()} <= {tuple(p) for p in everything.tolist()}
    assert np.abs(some.mean(0) - everything.mean(0)).max() < 0.25, "no part of the clip is preferred"


def test_sky_is_left_out() -> None:
    scene = wall_and_floor()
    depth = scene.depth.clone()
    depth[:, :4] = 2 * FAR_MEDIANS * float(depth.median())
    points, _ = scene_points(replace(scene, depth=depth), 10**6)
    assert points[:, 2].max() < 5.3


def test_depth_that_is_all_edges_still_gives_points() -> None:
    scene = wall_and_floor()
    noise = 1 + 4 * torch.rand(scene.depth.shape, generator=torch.Generator().manual_seed(0))
    assert len(scene_points(replace(scene, depth=noise), 10**6)[0]) > 0


def test_without_rgb_points_are_coloured_by_depth() -> None:
    scene = replace(wall_and_floor(), rgb=None)
    points, colours = scene_points(scene, 10**6)
    near = points[:, 2] < np.quantile(points[:, 2], 0.1)
    assert colours[near][:, 0].mean() > colours[~near][:, 0].mean()


@pytest.mark.parametrize("part", ["depth", "intrinsics", "cam_to_world"])
def test_what_is_needed_is_told(part: str) -> None:
    with pytest.raises(UserError, match="expected depth, intrinsics and cam_to_world"):
        scene_points(replace(wall_and_floor(), **{part: None}), 10)
