"""quantize_rows against the reference in eager torch and under torch.compile.

    python benchmarks/bench_quantize_rows.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                             [--threads N] [--rounds N] [--save]

Bytes are what must be moved: x in, one byte a value and the scales out.
"""

from __future__ import annotations

from functools import partial

import block_shapes
import harness
import torch

from u4d_fast import quantize_rows, reference


def main() -> None:
    options = block_shapes.parse(__doc__.splitlines()[0])
    copy_rate = harness.copy_bandwidth(options.device)
    ops = {
        f"{options.device} kernel": partial(quantize_rows, backend=options.device),
        "torch eager": reference.quantize_rows,
        "torch.compile": torch.compile(reference.quantize_rows, dynamic=False),
    }
    rows, skipped = list[harness.Row](), dict[str, str]()
    for case in block_shapes.cases(options):
        (x,) = case.activations(1)
        versions = {name: partial(block_shapes.forward, op, (x,)) for name, op in ops.items()}
        moved = block_shapes.bytes_of(x, reference.quantize_rows(x))
        rows += block_shapes.rows(case, versions, (x.double(),), moved, copy_rate, options.rounds, skipped)
        harness.keep("quantize_rows", rows, options, skipped)
    harness.show("quantize_rows", rows, options, skipped)


if __name__ == "__main__":
    main()
