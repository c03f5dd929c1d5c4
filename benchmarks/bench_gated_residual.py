"""gated_residual against the reference in eager torch and under torch.compile.

    python benchmarks/bench_gated_residual.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                              [--threads N] [--rounds N] [--save]

Bytes are what must be moved: x and update in, the result out, the gate once.
"""

from __future__ import annotations

import block_shapes
import harness
import torch

from u4d_fast import gated_residual, reference


def main() -> None:
    options = block_shapes.parse(__doc__.splitlines()[0])
    copy_rate = harness.copy_bandwidth(options.device)
    compiled = torch.compile(reference.gated_residual, dynamic=False)
    rows = []
    for case in block_shapes.cases(options):
        given = (*case.activations(2), *case.tables(1))
        versions = {
            f"{case.device} kernel": lambda given=given, device=case.device: (gated_residual(*given, backend=device),),
            "torch eager": lambda given=given: (reference.gated_residual(*given),),
            "torch.compile": lambda given=given: (compiled(*given),),
        }
        exact = (reference.gated_residual(*(part.double() for part in given)),)
        moved = 3 * given[0].nbytes + 4 * given[2].numel()
        with torch.no_grad():
            rows += block_shapes.rows(case, versions, exact, moved, copy_rate, options.rounds)
    harness.show("gated_residual", rows, options)


if __name__ == "__main__":
    main()
