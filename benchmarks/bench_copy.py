"""What memory gives: a copy, a read and a write, of an activation and of something larger than every cache.

    python benchmarks/bench_copy.py [--sustain 1] [--device cpu|cuda] [--threads N] [--seconds N] [--save]

The denominator of every memory-bound op. GB/s counts bytes read and written; the share is of the large copy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import harness
import sustained
import torch

LARGE = {"cuda": 2**30, "cpu": 2**28}  # bytes
STREAMS, TOKENS, WIDTH = 4, 4200, 1536  # an activation of wan-1.3b, bfloat16


def versions(count: int, device: str) -> dict[str, tuple[Callable[[], object], int]]:
    """Calls on `count` float32 numbers, and the bytes each moves."""
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    return {
        "copy": (lambda: target.copy_(source), 8 * count),
        "read": (lambda: source.sum(), 4 * count),
        "write": (lambda: target.zero_(), 4 * count),
    }


def main() -> None:
    parser = sustained.arguments(__doc__.splitlines()[0], seconds=1.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    large, activation = LARGE[options.device], 2 * STREAMS * TOKENS * WIDTH
    rows: list[harness.Row] = []
    copy_rate = 0.0
    for case, size in ((f"{large / 2**20:.0f} MiB", large), (f"an activation, {activation / 1e6:.0f} MB", activation)):
        for version, (call, moved) in versions(size // 4, options.device).items():
            times, state = sustained.measure_sustained(call, options.device, options.sustain)
            copy_rate = copy_rate or moved / (statistics.median(times) * 1e-3)
            rows.append(harness.row(case, version, times, moved, copy_rate, **state))
            harness.keep("copy", rows, options)
    harness.show("copy", rows, options)


if __name__ == "__main__":
    main()
