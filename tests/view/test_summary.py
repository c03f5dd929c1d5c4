"""summary.png: drawn for every kind of scene; what is in it is checked where a program can."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from example_scenes import wall_and_floor
from u4d.scene import Scene
from u4d.view.facts import scene_facts
from u4d.view.summary import write_summary
from u4d.view.tiles import given_frames, tile_rows

SCALED_DEPTH = "depth \N{MULTIPLICATION SIGN} 4"


def test_rows_of_a_result_with_truth() -> None:
    truth = wall_and_floor(frames=9)
    result = replace(truth, depth=truth.depth / 4, report={"observe": "rgb:0,-1"})
    rows = {row.label: row for row in tile_rows(result, truth, truth, [0, 4, 8], 200)}
    assert list(rows) == ["input", "RGB", "true RGB", SCALED_DEPTH, "true depth"]
    assert [picture is None for picture in rows["input"].pictures] == [False, True, False]
    assert np.array_equal(rows[SCALED_DEPTH].pictures[1], rows["true depth"].pictures[1]), "one colour, one depth"
    expected = (truth.rgb[4] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(rows["RGB"].pictures[1], expected)


def test_rows_without_truth_or_with_everything_given() -> None:
    scene = wall_and_floor()
    assert [row.label for row in tile_rows(scene, None, None, [0], 200)] == ["RGB", "depth"]
    assert [row.label for row in tile_rows(scene, scene, scene, [0], 200)] == ["input", "RGB", "depth", "true depth"]
    assert [row.label for row in tile_rows(Scene(cam_to_world=scene.cam_to_world), None, None, [0], 200)] == []


def test_given_frames_follow_the_report() -> None:
    """Six frames of a result, made of frames 0, 4 and 8 of the source, of which the last one's image was not given."""
    source, result = wall_and_floor(frames=9), wall_and_floor(frames=6)
    report = {"observe": "rgb:0:8,camera:all", "frames": [0, 4, 8], "slots": [0, 3, 5]}
    assert given_frames(replace(result, report=report), source) == {0: 0, 3: 4}
    assert given_frames(result, source) == {0: 0, 1: 2, 2: 3, 3: 5, 4: 6, 5: 8}


def test_large_pictures_are_shrunk() -> None:
    scene = wall_and_floor(frames=1, size=(120, 160))
    for row in tile_rows(scene, None, None, [0], 40):
        assert row.pictures[0].shape == (30, 40, 3)


def test_facts_say_what_is_true() -> None:
    scene = wall_and_floor(frames=6)
    facts = dict(scene_facts(scene, None, " m"))
    assert facts["field of view"].startswith("58.1"), "2 atan(1 / 1.8)"
    assert facts["turn, first to last"].startswith("14.3"), "0.25 rad"
    assert facts["path length"] == "1.36 m" and facts["scale"] == "2.5"
    assert facts["median depth"] == f"{float(scene.depth.median()):.3g} m"


def variants() -> dict[str, tuple[Scene, Scene | None, Scene | None, Any]]:
    scene = wall_and_floor()
    table = {"depth AbsRel": {"u4d": 0.123, "mean map": torch.tensor(0.4)}, "aligned by": {"u4d": "scale"}}
    result = replace(scene, depth=scene.depth / 3, report={"observe": "rgb:0", "metric": True})
    still = scene.cam_to_world[:1].expand(6, 4, 4)
    portrait = Scene(rgb=wall_and_floor(12, (64, 24)).rgb, cam_to_world=wall_and_floor(12).cam_to_world)
    return {
        "everything": (result, scene, scene, table),
        "one frame": (scene.frames([2]), scene.frames([2]), scene.frames([2]), {"AbsRel": 0.1, "none": None}),
        "no truth": (scene, scene, None, None),
        "portrait without depth": (portrait, None, None, None),
        "still camera": (replace(scene, cam_to_world=still), None, scene, None),
        "cameras alone": (Scene(cam_to_world=scene.cam_to_world), None, None, None),
        "rgb alone": (Scene(rgb=scene.rgb, caption="50 % of $x_2$, {odd} \\words\nsecond line"), None, None, None),
        "depth alone": (Scene(depth=scene.depth), None, None, None),
        "long table": (scene, None, scene, {f"error {i}": i / 3 for i in range(30)}),
    }


@pytest.mark.parametrize("kind", variants())
def test_every_kind_of_scene_is_drawn(tmp_path: Path, kind: str) -> None:
    result, source, truth, errors = variants()[kind]
    write_summary(tmp_path / "summary.png", result, source, truth, errors)
    with Image.open(tmp_path / "summary.png") as image:
        picture = np.asarray(image.convert("RGB"))
    assert picture.shape[1] == 1760 and 500 < picture.shape[0] < 2200
    assert (picture[0] == 255).all() and (picture[-1] == 255).all() and (picture[:, -3:] == 255).all(), "nothing is cut"
    assert 0.005 < (picture != 255).any(-1).mean() < 0.9


def test_frames_stand_in_the_picture_as_they_are(tmp_path: Path) -> None:
    """A frame of one colour makes a tile of that colour: its share of the picture is what the layout says."""
    colours = torch.tensor([[0.8, 0.2, 0.4], [0.1, 0.6, 0.3], [0.2, 0.2, 0.9], [0.7, 0.7, 0.1], [0.4, 0.0, 0.5]])
    write_summary(tmp_path / "s.png", Scene(rgb=colours[:, :, None, None].expand(5, 3, 24, 32)), None)
    with Image.open(tmp_path / "s.png") as image:
        picture = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in (colours * 255).round().byte().numpy():
        pixels = int((picture == colour).all(-1).sum())
        assert 300 * 220 < pixels < 320 * 240


def test_saving_draws_the_summary(tmp_path: Path) -> None:
    scene = wall_and_floor(frames=3)
    scene.save(tmp_path / "out", source=scene, truth=scene, errors={"AbsRel": 0.0})
    scene.save(tmp_path / "bare")
    sizes = []
    for name in ("out", "bare"):
        with Image.open(tmp_path / name / "summary.png") as image:
            sizes.append(image.size)
    assert sizes[0][1] > sizes[1][1], "two more rows: the input and the true depth"


def test_heavy_libraries_wait_until_they_are_used() -> None:
    code = "import sys, u4d.scene, u4d.data.open_scene, u4d.data.scene_folder, u4d.view.summary\n"
    code += "print([m for m in ('av', 'PIL', 'matplotlib', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
