"""ada_layer_norm, forward and backward, against the reference in eager torch and under torch.compile.

    python benchmarks/bench_ada_layer_norm.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                              [--threads N] [--rounds N] [--save]

Bytes are what must be moved: forward x in and the result out, backward the gradient and x in and x's gradient out;
the tables once.
"""

from __future__ import annotations

import block_shapes

if __name__ == "__main__":
    block_shapes.bench_both_ways(__doc__.splitlines()[0], "ada_layer_norm", passes=(2, 5))
