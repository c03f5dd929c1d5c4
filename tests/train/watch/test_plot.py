"""The curves of a run: whole logs, logs still being written, logs of older versions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from u4d.errors import UserError
from u4d.train.watch.plot import figure_of, plot_run, smooth


def old_step(step: int) -> dict[str, Any]:
    """A line of the first format."""
    return {"step": step, "loss": [1.0, 0.8, 0.6, 0.4], "grad_norm": 2.0, "seconds": 0.5, "data_wait": 0.1}


def new_step(step: int) -> dict[str, Any]:
    return old_step(step) | {"total": 0.7 / (1 + step), "lr": 1e-3, "clips": 8, "tflops": 1.0, "bad_clips": 0}


def validation(step: int) -> dict[str, Any]:
    names = ("abs_rel", "delta_1_25", "translation_direction_deg", "rotation_first_to_last_deg")
    found = {
        "loss": {"joint": [0.4, 0.3, 0.2, 0.1], "geometry_dense": [None, 0.3, 0.2, 0.1]},
        "metrics": dict.fromkeys(names, 0.3),
        "trivial": dict.fromkeys(names, 0.4),
        "correlations": {"pitch": 0.1, "tx": None},
    }
    return {"step": step, "validation": found}


WHOLE = [new_step(0), new_step(1), validation(2), new_step(2), new_step(3), validation(4)]


def write(run: Path, lines: list[dict[str, Any]], torn: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return run


def titles(lines: list[dict[str, Any]]) -> list[str]:
    return [axes.get_title("left") for axes in figure_of(lines).axes]


def test_a_panel_for_everything_that_the_log_knows() -> None:
    found = titles(WHOLE)
    assert len(found) == 12  # the speed's has a second axis, for waiting
    assert [title for title in found if title][:5] == [
        "training loss",
        "training loss per stream",
        "gradient norm before clipping",
        "learning rate",
        "speed",
    ]
    assert len(titles([new_step(0), new_step(1)])) == 6
    assert "learning rate" not in titles([old_step(0)]) and len(titles([old_step(0)])) == 5


def test_curves_show_the_logs_numbers() -> None:
    axes = {each.get_title("left"): each for each in figure_of(WHOLE).axes}
    raw, smoothed = axes["training loss"].lines
    assert raw.get_xdata().tolist() == [1, 2, 3, 4]
    assert raw.get_ydata() == pytest.approx([0.7 / step for step in (1, 2, 3, 4)])
    assert len(smoothed.get_ydata()) == 4
    joint, dense = axes["validation loss per pattern"].lines
    assert joint.get_xdata().tolist() == [2, 4]
    assert joint.get_ydata() == pytest.approx([0.25, 0.25]) and dense.get_ydata() == pytest.approx([0.2, 0.2])
    model, trivial = axes["AbsRel, lower is better"].lines
    assert model.get_ydata() == pytest.approx([0.3, 0.3]) and trivial.get_ydata() == pytest.approx([0.4, 0.4])
    assert axes["rotation first to last, degrees"].lines[0].get_ydata() == pytest.approx([0.3, 0.3])
    assert axes["speed"].lines[0].get_ydata() == pytest.approx([16.0] * 4)
    assert axes["speed"].get_ylabel() == "clips per second"


def test_older_logs_have_a_total_and_a_speed() -> None:
    axes = {each.get_title("left"): each for each in figure_of([old_step(0), old_step(1)]).axes}
    assert axes["training loss"].lines[0].get_ydata() == pytest.approx([0.7, 0.7])
    assert axes["speed"].get_ylabel() == "steps per second"
    assert axes["speed"].lines[0].get_ydata() == pytest.approx([2.0, 2.0])


def test_a_stream_without_targets_is_a_gap() -> None:
    lines = [new_step(0) | {"loss": [0.0, 0.8, 0.6, 0.4]}, new_step(1)]
    axes = {each.get_title("left"): each for each in figure_of(lines).axes}
    first, second = axes["training loss per stream"].lines[0].get_ydata()
    assert math.isnan(first) and second == 1.0


def test_a_picture_of_a_run(tmp_path: Path) -> None:
    run = write(tmp_path / "run", WHOLE)
    assert plot_run(run) == run / "curves.png"
    with Image.open(run / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 1000
    other = plot_run(run, tmp_path / "elsewhere" / "loss.png")
    assert other == tmp_path / "elsewhere" / "loss.png" and other.is_file()


def test_a_run_that_still_goes_on(tmp_path: Path) -> None:
    assert plot_run(write(tmp_path / "run", WHOLE, torn='{"step": 4, "lo')).is_file()
    assert plot_run(write(tmp_path / "old", [old_step(0)], torn='{"ste')).is_file()


def test_folders_without_a_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the folder of a training run, got one without log\.jsonl"):
        plot_run(tmp_path)
    with pytest.raises(UserError, match="expected the folder of a training run"):
        plot_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected at least one step"):
        plot_run(write(tmp_path / "run", [], torn='{"st'))
    assert not (tmp_path / "run" / "curves.png").exists()


def test_smoothing_is_a_mean_of_the_past() -> None:
    assert smooth(np.full(500, 3.0)) == pytest.approx(3.0)
    values = np.array([1.0, math.nan, 1.0])
    assert smooth(values)[0] == 1 and math.isnan(smooth(values)[1]) and smooth(values)[2] == 1
    noisy = np.random.default_rng(0).standard_normal(2000)
    assert smooth(noisy)[500:].std() < 0.2
