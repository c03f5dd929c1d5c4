"""ada_layer_norm_fp8 against the two ops it joins, and the reference in eager torch and under torch.compile.

    python benchmarks/bench_ada_layer_norm_fp8.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                                  [--threads N] [--rounds N] [--save]

Bytes are what must be moved: all arguments in and all results out, one byte a value where they are e4m3.
"""

from __future__ import annotations

import block_shapes

if __name__ == "__main__":
    block_shapes.bench_fp8(__doc__.splitlines()[0], "ada_layer_norm_fp8")
