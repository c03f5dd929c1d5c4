"""rms_norm, forward and backward, against the reference in eager torch and under torch.compile, and torch's own norm.

    python benchmarks/bench_rms_norm.py [--preset NAME] [--device cpu|cuda] [--threads N] [--rounds N] [--save]

The activations of one transformer block, `[S,B,T,D]`, for one clip and for two (both guidance branches). GB/s counts
one read and one write of the activations, and for the gradients two more reads and one more write.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor

from u4d import presets
from u4d.commands.op_cases import CASES, Sizes
from u4d_fast import reference, rms_norm

DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Version = Callable[..., Tensor]


def torchs_own(x: Tensor, weight: Tensor) -> Tensor:
    """torch's fused norm knows one weight: the streams' weights are multiplied to its result."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * weight[:, None, None]


def forward(version: Version, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (version(x, weight, *others),)


def forward_backward(version: Version, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """The gradients of x and weight; x itself, in the result's shape, is the gradient of the result."""
    leaves = (x.detach().requires_grad_(), weight.detach().requires_grad_())
    result = version(*leaves, *others)
    return torch.autograd.grad(result, leaves, x.view(result.shape))


def bench(op: str, exact: Version, versions: dict[str, Version], options: argparse.Namespace) -> None:
    """Time versions of an op of activations and a weight per stream, both ways, in every dtype and batch size.

    Args:
        op: a name among `CASES`.
        exact: what the versions must agree with, in float32.
        versions: by name, the kernel first.
        options: those of `parse`.
    """
    torch.set_num_threads(options.threads)
    copy_rate = harness.copy_bandwidth(options.device)
    config = presets.PRESETS[options.preset]().transformer
    rows, skipped = list[harness.Row](), dict[str, str]()
    for dtype, batch in itertools.product(DTYPES, (1, 2) if options.device == "cuda" else (1,)):
        sizes = Sizes.of(config, batch, dtype, options.device)
        x, weight, *others = CASES[op].arguments(sizes)
        for what, run, passes in (("forward", forward, 2), ("forward + backward", forward_backward, 5)):
            expected = run(exact, x.float(), weight.float(), *others)
            calls = {key: partial(run, version, x, weight, *others) for key, version in versions.items()}
            calls = harness.agreeing(calls, harness.close_to(expected, TOLERANCE[dtype]), skipped)
            times = harness.measure(calls, options.device, options.rounds)
            moved = passes * x.numel() * x.element_size()
            rows += [harness.row(f"{what}, {sizes}", key, times[key], moved, copy_rate) for key in calls]
            harness.keep(op, rows, options, skipped)
    harness.show(op, rows, options, skipped)


def parse(description: str) -> argparse.Namespace:
    """The options of all benchmarks, and whose shapes."""
    parser = harness.arguments(description)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="wan-1.3b", help="whose shapes")
    return parser.parse_args()


def main() -> None:
    options = parse(__doc__.splitlines()[0])
    versions: dict[str, Version] = {
        f"{options.device} kernel": partial(rms_norm, backend=options.device),
        "torch eager": reference.rms_norm,
        "torch.compile": torch.compile(reference.rms_norm, dynamic=False),
        "F.rms_norm * weight": torchs_own,
    }
    bench("rms_norm", reference.rms_norm, versions, options)


if __name__ == "__main__":
    main()
