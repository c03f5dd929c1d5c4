"""ada_layer_norm against the reference in eager torch and under torch.compile.

    python benchmarks/bench_ada_layer_norm.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                              [--threads N] [--rounds N] [--save]

Bytes are what must be moved: x in, the result out, the tables once.
"""

from __future__ import annotations

import block_shapes
import harness
import torch

from u4d_fast import ada_layer_norm, reference


def main() -> None:
    options = block_shapes.parse(__doc__.splitlines()[0])
    copy_rate = harness.copy_bandwidth(options.device)
    compiled = torch.compile(reference.ada_layer_norm, dynamic=False)
    rows = []
    for case in block_shapes.cases(options):
        given = (*case.activations(1), *case.tables(2))
        versions = {
            f"{case.device} kernel": lambda given=given, device=case.device: (ada_layer_norm(*given, backend=device),),
            "torch eager": lambda given=given: (reference.ada_layer_norm(*given),),
            "torch.compile": lambda given=given: (compiled(*given),),
        }
        exact = (reference.ada_layer_norm(*(part.double() for part in given)),)
        moved = 2 * given[0].nbytes + 4 * sum(table.numel() for table in given[1:])
        with torch.no_grad():
            rows += block_shapes.rows(case, versions, exact, moved, copy_rate, options.rounds)
    harness.show("ada_layer_norm", rows, options)


if __name__ == "__main__":
    main()
