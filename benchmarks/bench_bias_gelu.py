"""bias_gelu, forward and backward, against the reference in eager torch and under torch.compile.

    python benchmarks/bench_bias_gelu.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                         [--threads N] [--rounds N] [--save]

Bytes are what must be moved: forward x in and the result out, backward the gradient and x in and x's gradient out.
"""

from __future__ import annotations

import block_shapes

if __name__ == "__main__":
    block_shapes.bench_both_ways(__doc__.splitlines()[0], "bias_gelu", passes=(2, 5))
