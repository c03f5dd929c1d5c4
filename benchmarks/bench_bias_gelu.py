"""bias_gelu against the reference in eager torch and under torch.compile.

    python benchmarks/bench_bias_gelu.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                         [--threads N] [--rounds N] [--save]

Bytes are what must be moved: x in and the result out.
"""

from __future__ import annotations

import block_shapes
import harness
import torch

from u4d_fast import bias_gelu, reference


def main() -> None:
    options = block_shapes.parse(__doc__.splitlines()[0])
    copy_rate = harness.copy_bandwidth(options.device)
    compiled = torch.compile(reference.bias_gelu, dynamic=False)
    rows = []
    for case in block_shapes.cases(options):
        given = (
            *case.activations(1, case.hidden),
            torch.randn(block_shapes.STREAMS, case.hidden).to(case.device, case.dtype),
        )
        versions = {
            f"{case.device} kernel": lambda given=given, device=case.device: (bias_gelu(*given, backend=device),),
            "torch eager": lambda given=given: (reference.bias_gelu(*given),),
            "torch.compile": lambda given=given: (compiled(*given),),
        }
        exact = (reference.bias_gelu(*(part.double() for part in given)),)
        moved = 2 * given[0].nbytes
        with torch.no_grad():
            rows += block_shapes.rows(case, versions, exact, moved, copy_rate, options.rounds)
    harness.show("bias_gelu", rows, options)


if __name__ == "__main__":
    main()
