"""Times of every op beside the same in eager torch and compiled: what `u4d bench ops` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from u4d.commands.attention_times import Progress, Spread, time_calls
from u4d.commands.console import format_facts, format_table
from u4d.commands.op_cases import CASES, OpCase, Sizes


@dataclass(frozen=True)
class OpTimes:
    """One op: medians with the 10th and the 90th percentile, forward, or the reason why there are none.

    Attributes:
        kernel_ms, eager_ms, compiled_ms: (median, low, high); None where that was not measured.
        error: relative L2 distance of the kernel's results from the eager twin's.
        reason: why the kernel was not measured.
        compiled_reason: why torch.compile was not.
    """

    op: str
    kernel_ms: Spread | None = None
    eager_ms: Spread | None = None
    compiled_ms: Spread | None = None
    error: float | None = None
    reason: str = ""
    compiled_reason: str = ""


def measure_ops(names: list[str], sizes: Sizes, repeats: int, progress: Progress, *, compiled: bool) -> list[OpTimes]:
    """Those ops in turn.

    Args:
        names: of `CASES`.
        sizes: of what they are given.
        repeats: timed calls; fewer where they take long.
        progress: called with (op, ops done, ops in all).
        compiled: measure torch.compile as well.
    """
    timed = []
    for number, name in enumerate(names):
        progress(name, number, len(names))
        try:
            with torch.no_grad():
                timed.append(measure_op(name, CASES[name], sizes, repeats, compiled=compiled))
        except Exception as error:  # an op that can't run on this machine is a line of the table, not the end of it
            timed.append(OpTimes(name, reason=first_line(error)))
        if timed[-1].reason:  # it may have been too large for the memory; only here nothing holds what it had made
            torch.cuda.empty_cache()
    progress("done", len(names), len(names))
    return timed


def measure_op(name: str, case: OpCase, sizes: Sizes, repeats: int, *, compiled: bool) -> OpTimes:
    """One op by the kernel of its device, and its twin.

    Raises:
        BackendError: there is no kernel for that.
    """
    device = torch.device(sizes.device)
    given = case.arguments(sizes)
    kernel = partial(op_of(name), *given, backend=sizes.device)
    found = kernel()
    eager = twin_of(name)
    given = given if case.twin_arguments is None else case.twin_arguments(sizes)
    error = distance(found, eager(*given), case.outputs)
    del found
    kernel_ms = time_calls(kernel, repeats, device)
    eager_ms = time_calls(partial(eager, *given), repeats, device)
    compiled_ms, why = None, ""
    if compiled and case.compiled:
        try:
            compiled_ms = time_calls(partial(torch.compile(eager, dynamic=False), *given), repeats, device)
        except Exception as problem:  # no compiler on this machine, say
            why = first_line(problem)
    return OpTimes(name, kernel_ms, eager_ms, compiled_ms, error, compiled_reason=why)


def op_of(name: str) -> Callable[..., Any]:
    """The op itself."""
    op: Callable[..., Any] = getattr(import_module(f"u4d_fast.ops.{CASES[name].module}"), name)
    return op


def twin_of(name: str) -> Callable[..., Any]:
    """What it is compared with: a reference, in plain torch."""
    twin = CASES[name].twin or name
    reference: Callable[..., Any] = getattr(import_module(f"u4d_fast.reference.{CASES[twin].module}"), twin)
    return reference


def distance(found: Any, expected: Any, outputs: int = 0) -> float:
    """Relative L2 distance of the worst of (the first) results; those that are no numbers do not count."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))[: outputs or None]
    apart = [(a.double(), b.double()) for a, b in pairs if b.dtype.is_floating_point]
    return max(float((a - b).norm() / b.norm()) for a, b in apart)


def tensors(results: Any) -> Iterator[Tensor]:
    """The tensors of a result; fp8 rows as the numbers that they stand for."""
    if isinstance(results, Tensor):
        yield results
    elif hasattr(results, "dequantize"):
        yield results.dequantize()
    else:
        for part in results:
            yield from tensors(part)


def first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def as_json(sizes: Sizes, timed: list[OpTimes], name: str) -> dict[str, Any]:
    """Everything that was measured, for other programs."""
    shape = asdict(sizes) | {"dtype": str(sizes.dtype).removeprefix("torch.")}
    return {"device": name, "torch": torch.__version__, "sizes": shape, "ops": [asdict(one) for one in timed]}


def report(sizes: Sizes, timed: list[OpTimes], name: str) -> str:
    """The table, and what is missing from it."""
    rows = [["op", "kernel ms", "eager ms", "x", "compiled ms", "x", "error"]]
    for one in timed:
        if one.kernel_ms is not None:
            others = [cell for times in (one.eager_ms, one.compiled_ms) for cell in beside(times, one.kernel_ms)]
            rows.append([one.op, spread_text(one.kernel_ms), *others, f"{one.error:.1e}"])
    lines = [f"ops at {sizes} on {name}, torch {torch.__version__}", "", format_table(rows)]
    missing = [(f"  {one.op}", one.reason) for one in timed if one.reason]
    missing += [(f"  {one.op}, compiled", one.compiled_reason) for one in timed if one.compiled_reason]
    if missing:
        lines += ["", "not measured:", format_facts(missing)]
    return "\n".join(lines)


def beside(times: Spread | None, kernel: Spread) -> list[str]:
    """Cells of a twin: its time, and how many times as long as the kernel it takes."""
    return ["-", "-"] if times is None else [spread_text(times), f"{times[0] / kernel[0]:.1f}"]


def spread_text(times: Spread) -> str:
    """Median and half of what lies between the deciles."""
    return f"{times[0]:.3f} ± {(times[2] - times[1]) / 2:.3f}"
