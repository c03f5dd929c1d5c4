"""`u4d bench`: what it prints, saves and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from in_process import Command

from u4d.commands import attention_times, bench
from u4d.commands.attention_times import Shape, Timed
from u4d_fast.attention_table import forget_rankings, read_measured, user_file

SMALL = ("--device", "cpu", "--tokens", 48, "--heads", 2, "--head-dim", 16, "--repeats", 3)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("U4D_CACHE", str(tmp_path / "cache"))
    forget_rankings()
    yield
    forget_rankings()


def test_bench_alone_lists_what_can_be_measured(u4d: Command) -> None:
    shown = u4d("bench")
    assert (shown.code, shown.err) == (0, "") and "attention" in shown.out


def test_attention_prints_every_backend_or_why_it_is_missing(u4d: Command) -> None:
    shown = u4d("bench", "attention", *SMALL, "--batch", 2)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("attention of 2 x 48 tokens, 2 heads of 16, float32 on cpu, torch ")
    table, missing = shown.out.split("not measured:")
    rows = {line.split()[0]: line.split() for line in table.splitlines()[4:] if line}
    assert {"torch", "torch-flash", "torch-math"} <= set(rows)
    assert all(float(rows[name][-1]) < 1e-5 for name in ("torch", "torch-flash", "torch-math"))
    assert "of peak" not in table and "flash_attn is not installed (pip install flash-attn)" in missing
    assert not user_file().exists()


def test_attention_as_json(u4d: Command) -> None:
    found = json.loads(u4d("bench", "attention", *SMALL, "--dtype", "bfloat16", "--json").out)
    assert found["shape"] == {"batch": 1, "tokens": 48, "heads": 2, "head_dim": 16, "dtype": "bfloat16"}
    assert found["forward_flops"] == 4 * 2 * 48 * 48 * 16 and found["peak_flops"] is None
    by_name = {one["backend"]: one for one in found["backends"]}
    median, low, high = by_name["torch"]["forward_ms"]
    assert 0 < low <= median <= high and 0 < by_name["torch"]["error"] < 2e-2
    assert by_name["u4d"]["forward_ms"] is None and "CUDA" in by_name["u4d"]["reason"]


def test_saved_times_are_what_auto_chooses_by(u4d: Command) -> None:
    shown = u4d("bench", "attention", *SMALL, "--save")
    assert str(user_file()) in shown.out
    (row,) = read_measured(user_file())
    assert (row.device, row.dtype, row.head_dim, row.tokens, row.keys) == ("cpu", "float32", 16, 48, 48)
    assert set(row.forward_ms) == set(row.training_ms) == {"torch", "torch-flash", "torch-math"}
    assert all(row.training_ms[name] > row.forward_ms[name] for name in row.forward_ms)


def test_the_shape_comes_from_a_preset(u4d: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Shape] = []
    monkeypatch.setattr(attention_times, "measure_attention", lambda shape, *rest: seen.append(shape) or [])
    monkeypatch.setattr(bench, "attention_report", lambda *rest: "a table")
    for arguments in ((), ("--preset", "wan-1.3b"), ("--preset", "wan-1.3b", "--head-dim", 64, "--dtype", "float16")):
        assert u4d("bench", "attention", "--device", "cpu", *arguments).code == 0
    assert seen == [
        Shape(1, 1152, 3, 64, "float32"),
        Shape(1, 16800, 12, 128, "float32"),
        Shape(1, 16800, 12, 64, "float16"),
    ]


def test_the_table_has_rates_and_shares_of_the_peak() -> None:
    shape = Shape(1, 1000, 1, 250, "bfloat16")  # 1 GFLOP forward
    timed = [Timed("torch", (1.0, 0.9, 1.1), (5.0, 5.0, 5.0), 2e-3), Timed("u4d", reason="no such GPU")]
    text = bench.attention_report(shape, timed, "cpu", 10e12)
    assert "1.000 ± 0.100        1     10 %  5.000 ± 0.000      0.5      5 %  2.0e-03" in text
    assert "fastest forward: torch" in text and "u4d  no such GPU" in text


def test_a_backend_that_breaks_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(*qkv: torch.Tensor, backend: str) -> torch.Tensor:
        raise AssertionError("it wants another GPU\nand more")

    monkeypatch.setattr(attention_times, "dense_attention", attention)
    seen: list[tuple[str, int, int]] = []
    shape = Shape(1, 8, 1, 8, "float32")
    timed = attention_times.measure_attention(shape, "cpu", 1, lambda *at: seen.append(at))
    assert timed[0].reason == "it failed: it wants another GPU" and timed[0].forward_ms is None
    assert seen[-1] == ("done", len(timed), len(timed))
    assert "not measured" in bench.attention_report(shape, timed, "cpu", None)


def test_long_calls_are_repeated_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_times, "LONGEST_SECONDS", 0.0)
    calls: list[int] = []
    attention_times.time_calls(lambda: calls.append(1), 100, torch.device("cpu"))
    assert len(calls) == attention_times.WARM_UP + attention_times.LEAST_REPEATS


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nonsense",), "WHAT: expected one of attention, ops, got 'nonsense'"),
        (("attention", "--tokens", 0), "--tokens"),
        (("attention", "--dtype", "float8"), "--dtype"),
        (("attention", "--preset", "huge"), "--preset"),
        (("attention", "--repeats", "some"), "--repeats"),
    ],
)
def test_mistakes_are_one_line(u4d: Command, arguments: tuple[object, ...], named: str) -> None:
    shown = u4d("bench", *arguments)
    assert shown.code == 2 and shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("u4d: error: ") and named in line
