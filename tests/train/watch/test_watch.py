"""Watching a run: the log's lines, cutting it back on resume, TensorBoard's events, the bar's words."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from u4d.errors import UserError
from u4d.train.cost.peaks import named_peak, peak_flops
from u4d.train.watch.log import read_log
from u4d.train.watch.validate import Validation
from u4d.train.watch.watch import NO_TENSORBOARD, Pace, StepRecord, Watch, cut_log, postfix, validation_text

RECORD = StepRecord(
    step=0,
    loss=(0.5, 0.25, 0.125, 0.0625),
    total=0.234375,
    grad_norm=1.5,
    lr=1e-3,
    seconds=2.0,
    data_wait=0.5,
    clips=16,
    flops=4e12,
    bad_clips=0,
)
VALIDATION = Validation(
    step=2,
    losses={"joint": (0.4, 0.3, 0.2, 0.1), "geometry_dense": (math.nan, 0.3, 0.2, 0.1)},
    metrics={
        "abs_rel": 0.3,
        "delta_1_25": 0.5,
        "translation_direction_deg": 30.0,
        "rotation_first_to_last_deg": 5.0,
    },
    trivial={
        "abs_rel": 0.4,
        "delta_1_25": 0.4,
        "translation_direction_deg": 90.0,
        "rotation_first_to_last_deg": 6.5,
    },
    correlations={"pitch": 0.5, "yaw": math.nan},
    grid=np.full((8, 12, 3), 7, np.uint8),
)


def watch(out: Path, first_step: int = 0, *, main: bool = True, peak: float | None = None) -> Watch:
    return Watch(out, first_step, 4, main=main, progress=False, peak_flops=peak)


def strict_json(text: str) -> Any:
    """JSON as the standard has it, without NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"not JSON: {word}")

    return json.loads(text, parse_constant=refuse)


def lines(out: Path) -> list[Any]:
    return [strict_json(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_step_is_a_line(tmp_path: Path) -> None:
    with watch(tmp_path) as seen:
        seen.step(RECORD)
        assert len(lines(tmp_path)) == 1  # in the file before the run goes on
        seen.step(replace(RECORD, step=1, total=math.nan, grad_norm=math.inf, bad_clips=3))
    first, second = lines(tmp_path)
    first.pop("note", None)
    assert first == {
        "step": 0,
        "loss": [0.5, 0.25, 0.125, 0.0625],
        "total": 0.234375,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "seconds": 2.0,
        "data_wait": 0.5,
        "clips": 16,
        "tflops": 2.0,
        "bad_clips": 0,
    }
    assert second["total"] is None and second["grad_norm"] is None and second["bad_clips"] == 3


def test_a_validation_is_a_line_of_its_own_kind_and_a_picture(tmp_path: Path) -> None:
    with watch(tmp_path) as seen:
        seen.validation(VALIDATION)
    (line,) = lines(tmp_path)
    assert line["step"] == 2 and "loss" not in line
    assert line["validation"]["loss"] == {"joint": [0.4, 0.3, 0.2, 0.1], "geometry_dense": [None, 0.3, 0.2, 0.1]}
    assert line["validation"]["metrics"] == VALIDATION.metrics and line["validation"]["trivial"] == VALIDATION.trivial
    assert line["validation"]["correlations"] == {"pitch": 0.5, "yaw": None}
    with Image.open(tmp_path / "validation" / "step_00000002.png") as picture:
        assert np.array_equal(np.asarray(picture), VALIDATION.grid)
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["step_00000002.png"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with watch(tmp_path / "run", main=False) as seen:
        seen.step(RECORD)
        seen.validation(VALIDATION)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_writes_its_steps_once(tmp_path: Path) -> None:
    """Stopped after step 3 while it wrote a line; the newest state is that of two steps."""
    with watch(tmp_path) as seen:
        for step in range(4):
            seen.step(replace(RECORD, step=step))
            if step in (1, 3):
                seen.validation(replace(VALIDATION, step=step + 1))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": [0.')
    with watch(tmp_path, first_step=2) as seen:
        for step in (2, 3):
            seen.step(replace(RECORD, step=step, total=9.0))
    found = [(line["step"], line.get("total")) for line in lines(tmp_path)]
    # The validation at two steps done belongs to the state that the run goes on from.
    assert found == [(0, 0.234375), (1, 0.234375), (2, None), (2, 9.0), (3, 9.0)]


def test_cutting_keeps_a_log_that_is_short_enough(tmp_path: Path) -> None:
    cut_log(tmp_path, 3)
    assert not (tmp_path / "log.jsonl").exists()
    with watch(tmp_path) as seen:
        seen.step(RECORD)
    before = (tmp_path / "log.jsonl").read_bytes()
    cut_log(tmp_path, 3)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    cut_log(tmp_path, 0)
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_older_lines_are_cut_too(tmp_path: Path) -> None:
    line = '{"step": %d, "loss": [1.0, 1.0, 1.0, 1.0], "grad_norm": 1.0, "seconds": 1.0, "data_wait": 0.0}\n'
    (tmp_path / "log.jsonl").write_text(line % 0 + line % 1)
    cut_log(tmp_path, 1)
    assert [each["step"] for each in lines(tmp_path)] == [0]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl: line 2: .*delete that line"):
        cut_log(tmp_path, 1)
    with pytest.raises(UserError, match="expected the log of a training run"):
        read_log(tmp_path / "none.jsonl")


def events_of(out: Path) -> Any:
    """TensorBoard's own reading of a run."""
    reason = "tensorboard (optional) is not installed"
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    events = reader.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_reads_steps_and_validations(tmp_path: Path) -> None:
    with watch(tmp_path, peak=4e12) as seen:
        for step in range(2):
            seen.step(replace(RECORD, step=step))
        seen.validation(VALIDATION)
    events = events_of(tmp_path)
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["loss/ray_moment"] == [(1, 0.0625), (2, 0.0625)]
    assert found["loss/total"] == [(1, 0.234375), (2, 0.234375)]
    assert found["speed/mfu"] == [(1, 0.5), (2, 0.5)] and found["speed/clips_per_second"][0] == (1, 8.0)
    assert found["validation/abs_rel"][0] == (2, pytest.approx(0.3))
    assert found["validation/abs_rel_trivial"][0] == (2, pytest.approx(0.4))
    assert "validation_geometry_dense/depth" in found and "validation_geometry_dense/rgb" not in found
    assert "correlation/yaw" not in found
    assert [image.step for image in events.Images("validation")] == [2]


def test_tensorboard_forgets_what_is_done_again(tmp_path: Path) -> None:
    with watch(tmp_path) as seen:
        for step in range(4):
            seen.step(replace(RECORD, step=step))
    with watch(tmp_path, first_step=2) as seen:
        seen.step(replace(RECORD, step=2, total=9.0))
    found = [(event.step, event.value) for event in events_of(tmp_path).Scalars("loss/total")]
    assert found == [(1, 0.234375), (2, 0.234375), (3, 9.0)]


def test_without_tensorboard_the_log_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with watch(tmp_path) as seen:
        for step in range(3):
            seen.step(replace(RECORD, step=step))
        seen.validation(VALIDATION)
    assert [line.get("note") for line in lines(tmp_path)] == [NO_TENSORBOARD, None, None, None]
    assert not (tmp_path / "tensorboard").exists()


def test_the_bar_says_what_matters() -> None:
    pace = Pace().after(RECORD)
    assert postfix(RECORD, pace, 4e12) == (
        "rgb 0.500 depth 0.250 ray_dir 0.125 ray_moment 0.062 | grad 1.50 | 8.0 clips/s | MFU 50% | wait 25%"
    )
    words = postfix(replace(RECORD, bad_clips=2), pace, None)
    assert "2 TFLOP/s" in words and words.endswith("2 bad clips")


def test_rates_are_smoothed_without_a_bias() -> None:
    """A constant rate is that from the first step on; a single slow step moves it a little."""
    pace = Pace()
    for _ in range(100):
        pace = pace.after(RECORD)
        assert pace.clips / pace.seconds == pytest.approx(8)
    slow = pace.after(replace(RECORD, seconds=4.0))
    assert 7 < slow.clips / slow.seconds < 8


def test_the_bar_is_shown_when_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(tmp_path, 1, 4, main=True, progress=True, peak_flops=None) as seen:
        seen.step(replace(RECORD, step=1))
        seen.validation(VALIDATION)
    shown = capsys.readouterr()
    assert "2/4" in shown.err and validation_text(VALIDATION) in shown.out
    assert "geometry_dense 0.200" in shown.out and "AbsRel 0.300 (0.400)" in shown.out
    with watch(tmp_path, 2) as seen:
        seen.step(replace(RECORD, step=2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H20", None),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert named_peak(name) == peak


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops("cpu") is None
