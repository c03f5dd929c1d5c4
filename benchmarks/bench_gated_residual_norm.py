"""gated_residual_norm, forward and backward, against the reference in eager torch and under torch.compile.

    python benchmarks/bench_gated_residual_norm.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                                   [--threads N] [--rounds N] [--save]

Bytes are what must be moved: forward x and update in and both results out, backward two gradients and two saved
tensors in and two gradients out; the tables once.
"""

from __future__ import annotations

import block_shapes

if __name__ == "__main__":
    block_shapes.bench_both_ways(__doc__.splitlines()[0], "gated_residual_norm", passes=(4, 10))
