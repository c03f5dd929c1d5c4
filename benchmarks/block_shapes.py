"""What the benchmarks of a transformer block's element-wise ops share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor

import u4d_fast
from u4d import presets
from u4d.commands.op_cases import CASES, STREAMS, Sizes
from u4d_fast.fp8 import Fp8Rows

__all__ = ["STREAMS", "Sizes", "bench_both_ways", "bench_fp8", "bytes_of", "cases", "parse", "rows"]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
FP8_TOLERANCE = 0.05  # half a step of e4m3 is 1/28 of the largest


def parse(description: str) -> argparse.Namespace:
    """The options of all benchmarks, and whose shapes."""
    parser = harness.arguments(description)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="wan-1.3b", help="whose shapes")
    parser.add_argument("--batches", type=int, nargs="+", help="clips in one call; 1 and 2 on a GPU, else 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def cases(options: argparse.Namespace) -> Iterator[Sizes]:
    """Both dtypes at every batch size."""
    config = presets.PRESETS[options.preset]().transformer
    for batch in options.batches or ([1, 2] if options.device == "cuda" else [1]):
        for dtype in (torch.bfloat16, torch.float32):
            yield Sizes.of(config, batch, dtype, options.device)


def bytes_of(*parts: Any) -> int:
    """Bytes of tensors and of rows of e4m3; other arguments have none."""
    tensors = [tensor for part in parts for tensor in (part if isinstance(part, Fp8Rows) else (part,))]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def check(exact: tuple[Tensor, ...], found: tuple[Tensor | Fp8Rows, ...], tolerance: float, name: str) -> None:
    """Refuse to time what is not right; rows of e4m3 are compared as the numbers that they stand for."""
    for one, other in zip(exact, found, strict=True):
        if isinstance(other, Fp8Rows):
            harness.check_close((one,), (other.dequantize(),), FP8_TOLERANCE, name)
        else:
            harness.check_close((one,), (other,), tolerance, name)


def rows(
    case: Sizes,
    versions: Mapping[str, Callable[[], tuple[Tensor | Fp8Rows, ...]]],
    exact: tuple[Tensor, ...],
    moved_bytes: int,
    copy_rate: float,
    rounds: int,
    skipped: dict[str, str],
    what: str = "",
) -> list[harness.Row]:
    """Check the versions against float64, time them in turns, and give each one's time over the first's."""
    right = harness.agreeing(versions, lambda name, call: check(exact, call(), TOLERANCE[case.dtype], name), skipped)
    times = harness.measure(right, case.device, rounds)
    made = [harness.row(f"{case}{what}", name, times[name], moved_bytes, copy_rate) for name in right]
    for one in made:
        one.notes["times_the_kernel"] = one.ms / made[0].ms
    return made


def forward(op: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's results."""
    with torch.no_grad():
        found = op(*given)
    return (found,) if isinstance(found, Tensor | Fp8Rows) else found


def forward_backward(op: Callable[..., Any], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of all arguments; the first argument itself is the gradient of each result."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    found = op(*leaves)
    results = (found,) if isinstance(found, Tensor) else found
    return torch.autograd.grad(results, leaves, [given[0]] * len(results))


def bench_both_ways(description: str, name: str, passes: tuple[int, int]) -> None:
    """Time `u4d_fast.<name>` and its reference, eager and compiled: forward alone, and forward with backward.

    Args:
        description: of the benchmark.
        name: of the op; activations come first among its arguments.
        passes: how often activations cross memory, forward alone and with backward; tables cross once.
    """
    options = parse(description)
    copy_rate = harness.copy_bandwidth(options.device)
    plain = getattr(u4d_fast.reference, name)
    ops = {
        f"{options.device} kernel": partial(getattr(u4d_fast, name), backend=options.device),
        "torch eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
    }
    made, skipped = list[harness.Row](), dict[str, str]()
    for case in cases(options):
        given = CASES[name].arguments(case)
        exactly = tuple(part.double() for part in given)
        tables_bytes = sum(part.nbytes for part in given if part.numel() < given[0].numel())
        for run, what, count in zip((forward, forward_backward), ("", ", forward + backward"), passes, strict=True):
            versions = {key: partial(run, op, given) for key, op in ops.items()}
            moved = count * given[0].nbytes + tables_bytes
            made += rows(case, versions, run(plain, exactly), moved, copy_rate, options.rounds, skipped, what)
            harness.keep(name, made, options, skipped)
    harness.show(name, made, options, skipped)


def bench_fp8(description: str, name: str) -> None:
    """Time `u4d_fast.<op>_fp8`, the exact op with `quantize_rows` after it, and the reference, eager and compiled.

    Bytes are those of all arguments and results, once.

    Args:
        description: of the benchmark.
        name: of the op, with "_fp8" at its end; activations come first among its arguments.
    """
    options = parse(description)
    copy_rate = harness.copy_bandwidth(options.device)
    exact, plain = name.removesuffix("_fp8"), getattr(u4d_fast.reference, name)
    kernel = partial(getattr(u4d_fast, name), backend=options.device)
    ops = {
        f"{options.device} kernel": kernel,
        "two kernels": partial(then_quantized, getattr(u4d_fast, exact), options.device),
        "torch eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
    }
    made, skipped = list[harness.Row](), dict[str, str]()
    for case in cases(options):
        given = CASES[name].arguments(case)
        exactly = tuple(part.double() if isinstance(part, Tensor) else part for part in given)
        versions = {key: partial(forward, op, given) for key, op in ops.items()}
        truth = forward(getattr(u4d_fast.reference, exact), exactly)
        moved = bytes_of(*given, *forward(kernel, given))
        made += rows(case, versions, truth, moved, copy_rate, options.rounds, skipped)
        harness.keep(name, made, options, skipped)
    harness.show(name, made, options, skipped)


def then_quantized(op: Callable[..., Any], backend: str, *given: Any) -> tuple[Any, ...]:
    """The results of an op, the last of them as rows of e4m3."""
    *first, last = forward(partial(op, backend=backend), given)
    return *first, u4d_fast.quantize_rows(last, backend=backend)
