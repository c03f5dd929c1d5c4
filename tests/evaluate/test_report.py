"""Reports say what was measured, in three forms, and hide nothing."""

from __future__ import annotations

import json
import math

import pytest

from u4d.errors import UserError
from u4d.evaluate.report import format_json, format_markdown, format_text
from u4d.evaluate.results import METRICS, EvaluationReport, Row


def report() -> EvaluationReport:
    model = Row(
        "model",
        False,
        {"abs_rel": (0.1, 0.2, 0.6), "ate": (0.5, math.nan, 0.25), "ssim": (0.9, 0.9, 0.9)},
        {"pitch": 0.5, "yaw": math.nan, "roll": 0.1, "tx": 0.2, "ty": 0.3, "tz": 0.4},
    )
    line = Row("straight line", True, {"ate": (0.1, 0.1, 0.1), "focal_error": (math.nan,) * 3})
    settings = {"observe": "rgb:all", "steps": 40}
    return EvaluationReport("held-out clips", settings, {"depth": "scale: by medians"}, (model, line), 3, 1.5)


def test_summaries_leave_out_what_is_undefined_and_count_the_rest() -> None:
    abs_rel = report().row("model").summary("abs_rel")
    assert (abs_rel.mean, abs_rel.median, abs_rel.count) == (pytest.approx(0.3), 0.2, 3)
    ate = report().row("model").summary("ate")
    assert (ate.mean, ate.median, ate.count) == (0.375, 0.375, 2)
    nothing = report().row("straight line").summary("focal_error")
    assert math.isnan(nothing.mean) and nothing.count == 0
    assert report().metrics == ("abs_rel", "ate", "ssim")


def test_text_holds_every_number_its_alignment_and_its_count() -> None:
    text = format_text(report())
    lines = {line.split("  ")[0]: line.split("  ") for line in text.splitlines()}
    assert lines["AbsRel ↓"][-1] == "0.300 / 0.200"
    assert "0.3750 / 0.3750 (2)" in map(str.strip, lines["ATE ↓"])
    assert lines["ATE ↓"][-1].strip() == "0.1000 / 0.1000"
    assert lines["SSIM ↑"][-1] == "0.900 / 0.900"
    assert lines["correlation of pitch ↑"][-1].strip() == "-"
    assert "0.50" in "".join(lines["correlation of pitch ↑"])
    assert "correlation of yaw ↑" not in lines  # nobody has one
    assert "depth alignment: scale: by medians" in text
    assert "observe rgb:all, steps 40" in text
    assert "3 clips, 1.50 s per clip" in text


def test_each_table_lines_up_and_has_only_the_columns_that_say_something() -> None:
    blocks = format_text(report()).split("\n\n")[1:-1]
    assert [block.split()[0] for block in blocks] == ["depth", "camera", "images"]
    for block in blocks:
        lines = block.splitlines()
        assert set(lines[1]) == {"-"}
        assert len({len(line) for line in lines}) == 1
    assert ["straight line" in block for block in blocks] == [False, True, False]


def test_markdown_is_a_table_per_group() -> None:
    tables = [block.splitlines() for block in format_markdown(report()).split("\n\n") if block.startswith("|")]
    assert [table[0] for table in tables] == [
        "| depth | model |",
        "| camera | model | straight line |",
        "| images | model |",
    ]
    assert tables[1][1] == "| --- | ---: | ---: |"
    assert tables[0][2] == "| AbsRel ↓ | 0.300 / 0.200 |"
    assert all(line.count("|") == table[0].count("|") for table in tables for line in table)


def test_json_is_standard_and_complete() -> None:
    text = format_json(report())
    assert "NaN" not in text
    data = json.loads(text)
    model = data["rows"][0]
    assert model["metrics"]["ate"] == {"mean": 0.375, "median": 0.375, "count": 2, "values": [0.5, None, 0.25]}
    assert model["correlations"]["yaw"] is None
    assert data["alignments"] == {"depth": "scale: by medians"}
    assert data["rows"][1]["trivial"] is True


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="expected one of model, straight line, got 'modle'"):
        report().row("modle")
    with pytest.raises(UserError, match="expected one of abs_rel, ate, ssim for 'model', got 'psnr'"):
        report().row("model").summary("psnr")
    assert all(metric.better in ("lower", "higher") for metric in METRICS.values())
