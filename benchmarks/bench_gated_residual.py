"""gated_residual, forward and backward, against the reference in eager torch and under torch.compile.

    python benchmarks/bench_gated_residual.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                              [--threads N] [--rounds N] [--save]

Bytes are what must be moved: forward x and update in and the result out, backward the gradient and update in and
update's gradient out; the gate once.
"""

from __future__ import annotations

import block_shapes

if __name__ == "__main__":
    block_shapes.bench_both_ways(__doc__.splitlines()[0], "gated_residual", passes=(3, 6))
