"""causal_norm_silu against the reference in eager torch and under torch.compile, at the sizes of Wan's VAE.

    python benchmarks/bench_causal_norm_silu.py [--device cpu|cuda] [--threads N] [--rounds N] [--save]

The three widths of the decoder for 49 frames of 240x320 (on a CPU 5 frames of 48x64): the norm behind a block's first
convolution, with its bias, and the one behind a residual sum. Bytes are what must be moved: rows in and rows out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import harness
import torch
from torch import Tensor

import u4d_fast
from u4d_fast import reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CLIPS = {"cuda": (49, 240, 320), "cpu": (5, 48, 64)}  # frames, height, width
LEVELS = ((96, 1, 1), (192, 1, 2), (384, 2, 4))  # channels, and by what time and sides are divided


class Case(NamedTuple):
    """Rows `[1,T,H,W,C]` twice, and tables `[C]`."""

    name: str
    x: Tensor
    update: Tensor
    gamma: Tensor
    bias: Tensor


def cases(device: str) -> Iterator[Case]:
    """Every width in both types."""
    frames, height, width = CLIPS[device]
    for dtype in TOLERANCE:
        for channels, slower, smaller in LEVELS:
            shape = (1, (frames + slower - 1) // slower, height // smaller, width // smaller, channels)
            x, update = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
            tables = (torch.rand(channels, device=device, dtype=dtype) for _ in range(2))
            yield Case(f"{list(shape[1:])} {str(dtype).removeprefix('torch.')}", x, update, *tables)


def after_bias(normed: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
    return (normed(case.x, case.gamma, case.bias),)


def after_sum(normed: Callable[..., tuple[Tensor, Tensor]], case: Case) -> tuple[Tensor, ...]:
    return normed(case.x, case.update, case.gamma, case.bias)


@torch.no_grad()
def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    copy_rate = harness.copy_bandwidth(options.device)
    kernel = f"{options.device} kernel"
    versions = {
        after_bias: {
            kernel: partial(u4d_fast.causal_norm_silu, backend=options.device),
            "torch eager": reference.causal_norm_silu,
            "torch.compile": torch.compile(reference.causal_norm_silu, dynamic=False),
        },
        after_sum: {
            kernel: partial(u4d_fast.residual_causal_norm_silu, backend=options.device),
            "torch eager": reference.residual_causal_norm_silu,
            "torch.compile": torch.compile(reference.residual_causal_norm_silu, dynamic=False),
        },
    }
    rows, skipped = list[harness.Row](), dict[str, str]()
    for case in cases(options.device):
        for run, passes in ((after_bias, 2), (after_sum, 4)):
            calls = {name: partial(run, version, case) for name, version in versions[run].items()}
            exact = run(versions[run]["torch eager"], Case(case.name, *(part.float() for part in case[1:])))
            calls = harness.agreeing(calls, harness.close_to(exact, TOLERANCE[case.x.dtype]), skipped)
            del exact
            times = harness.measure(calls, options.device, options.rounds)
            what = f"{run.__name__.replace('_', ' ')}, {case.name}"
            rows += [harness.row(what, name, times[name], passes * case.x.nbytes, copy_rate) for name in calls]
            harness.keep("causal_norm_silu", rows, options, skipped)
    harness.show("causal_norm_silu", rows, options, skipped)


if __name__ == "__main__":
    main()
