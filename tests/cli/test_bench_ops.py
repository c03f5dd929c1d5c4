"""`u4d bench ops`: its table of cases, what it prints and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from in_process import Command

import u4d_fast
from u4d import presets
from u4d.commands import op_times
from u4d.commands.op_cases import CASES, Sizes
from u4d.commands.op_times import OpTimes, distance, measure_ops, op_of, twin_of

QUICK = ("bench", "ops", "--preset", "debug", "--device", "cpu", "--repeats", 3)
EXACT, ROUNDED = 1e-5, 0.2


def debug_sizes(dtype: torch.dtype = torch.float32) -> Sizes:
    return Sizes.of(presets.debug().transformer, 2, dtype, "cpu")


@pytest.mark.parametrize("name", CASES)
def test_an_op_takes_its_case_and_agrees_with_its_twin(name: str) -> None:
    case = CASES[name]
    given = case.arguments(debug_sizes())
    others = given if case.twin_arguments is None else case.twin_arguments(debug_sizes())
    with torch.no_grad():
        apart = distance(op_of(name)(*given), twin_of(name)(*others), case.outputs)
    assert apart < (ROUNDED if "fp8" in name or name == "quantize_rows" else EXACT)


def test_every_public_op_has_a_case() -> None:
    gradients = {name for name in u4d_fast.info()["ops"] if name.endswith("_grad")}
    assert set(u4d_fast.info()["ops"]) - gradients <= CASES.keys()


def test_sizes_are_the_presets() -> None:
    sizes = Sizes.of(presets.wan_1_3b().transformer, 1, torch.bfloat16, "cpu")
    assert (sizes.frames, sizes.patches, sizes.width, sizes.hidden) == (14, 300, 1536, 8960)
    assert str(sizes) == "B=1 F=14 P=300, bf16"


def test_ops_are_shown_beside_eager_torch(u4d: Command) -> None:
    shown = u4d(*QUICK, "--op", "rms_norm", "--op", "multi_stream_attention", "--no-compile", "--batch", 2)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("ops at B=2 F=3 P=6, fp32 on cpu, torch ")
    table, missing = shown.out.split("not measured:")
    (row,) = (line.split() for line in table.splitlines() if line.startswith("rms_norm"))
    kernel, eager, factor, error = float(row[1]), float(row[4]), float(row[7]), float(row[-1])
    assert kernel > 0 and eager > 0 and factor > 0 and error < 1e-5 and row[8:10] == ["-", "-"]
    assert "no CPU kernel of multi_stream_attention" in missing


def test_types_that_no_kernel_takes_are_told(u4d: Command) -> None:
    shown = u4d(*QUICK, "--op", "rms_norm", "--no-compile", "--dtype", "float64")
    assert shown.code == 0 and "P=6, fp64 on cpu" in shown.out and "float64" in shown.out.split("not measured:")[1]


def test_ops_as_json_with_torch_compile(u4d: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    found = json.loads(u4d(*QUICK, "--op", "bias_gelu", "--dtype", "bfloat16", "--json").out)
    (one,) = found["ops"]
    assert found["sizes"]["dtype"] == "bfloat16" and found["device"] == "cpu"
    assert all(low <= median <= high for median, low, high in (one["kernel_ms"], one["eager_ms"], one["compiled_ms"]))
    assert 0 <= one["error"] < 1e-2 and not one["reason"]


def test_a_compiler_that_is_missing_costs_its_column_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object, dynamic: bool) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    seen: list[tuple[str, int, int]] = []
    (one,) = measure_ops(["rms_norm"], debug_sizes(), 1, lambda *at: seen.append(at), compiled=True)
    assert one.kernel_ms and one.eager_ms and one.compiled_ms is None and one.compiled_reason == "no C++ compiler"
    assert seen == [("rms_norm", 0, 1), ("done", 1, 1)]


def test_the_table_tells_how_many_times_as_long_others_take() -> None:
    timed = [OpTimes("rms_norm", (1.0, 0.9, 1.1), (5.0, 5.0, 5.0), None, 2e-3), OpTimes("other", reason="no GPU")]
    text = op_times.report(debug_sizes(), timed, "a card")
    assert "1.000 ± 0.100  5.000 ± 0.000  5.0            -  -  2.0e-03" in text and "  other  no GPU" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("ops", "--op", "sing"), "--op: expected one of pack_rays"),
        (("ops", "--save"), "--save: expected it with 'attention', got it with 'ops'"),
        (("ops", "--head-dim", 64), "--head-dim: expected it with 'attention'"),
        (("attention", "--no-compile"), "--no-compile: expected it with 'ops', got it with 'attention'"),
    ],
)
def test_mistakes_are_one_line(u4d: Command, arguments: tuple[object, ...], named: str) -> None:
    shown = u4d("bench", *arguments)
    assert shown.code == 2 and shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("u4d: error: ") and named in line
