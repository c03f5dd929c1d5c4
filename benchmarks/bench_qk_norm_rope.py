"""qk_norm_rope, forward and backward, against the same steps in eager torch and under torch.compile.

    python benchmarks/bench_qk_norm_rope.py [--preset NAME] [--device cpu|cuda] [--threads N] [--rounds N] [--save]

The projected queries of one transformer block, `[S,B,T,D]`, for one clip and for two (both guidance branches); a block
does it twice, for queries and for keys. GB/s counts one read and one write of the activations, and for the gradients
two more reads and one more write.
"""

from __future__ import annotations

from functools import partial

import torch
from bench_rms_norm import Version, bench, parse
from torch import Tensor

from u4d_fast import qk_norm_rope, reference


def step_by_step(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """As a model writes it: the norm's result is rounded to x's dtype before it is turned."""
    normed = reference.rms_norm(x, weight).unflatten(-1, (heads, -1))
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
    return turned.transpose(0, 1).flatten(1, 2).contiguous()


def main() -> None:
    options = parse(__doc__.splitlines()[0])
    versions: dict[str, Version] = {
        f"{options.device} kernel": partial(qk_norm_rope, backend=options.device),
        "torch eager": step_by_step,
        "torch.compile": torch.compile(step_by_step, dynamic=False),
    }
    bench("qk_norm_rope", reference.qk_norm_rope, versions, options)


if __name__ == "__main__":
    main()
