"""qk_norm_rope, forward and backward, against the same steps in eager torch and under torch.compile.

    python benchmarks/bench_qk_norm_rope.py [--preset NAME] [--device cpu|cuda] [--threads N] [--rounds N] [--save]

The projected queries of one transformer block, `[S,B,T,D]`, for one clip and for two (both guidance branches); a block
does it twice, for queries and for keys. GB/s counts one read and one write of the activations, and for the gradients
two more reads and one more write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import harness
import torch
from bench_rms_norm import TOLERANCE, cases
from torch import Tensor

from u4d import presets
from u4d_fast import qk_norm_rope, reference

Version = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def tables(config: presets.TransformerConfig, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[T,d/2]` of angles of the size that rotary positions have."""
    g = torch.Generator().manual_seed(1)
    angles = 20 * torch.rand(tokens, config.attention_head_dim // 2, generator=g)
    return angles.cos().to(device), angles.sin().to(device)


def step_by_step(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """As a model writes it: the norm's result is rounded to x's dtype before it is turned."""
    normed = reference.rms_norm(x, weight).unflatten(-1, (heads, -1))
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
    return turned.transpose(0, 1).flatten(1, 2).contiguous()


def forward(version: Version, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (version(x, weight, cos, sin, heads),)


def forward_backward(
    version: Version, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, ...]:
    """The gradients of x and weight; x itself, in another shape, is the gradient of the result."""
    leaves = (x.detach().requires_grad_(), weight.detach().requires_grad_())
    rotated = version(*leaves, cos, sin, heads)
    return torch.autograd.grad(rotated, leaves, x.view(rotated.shape))


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="wan-1.3b", help="whose shapes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    copy_rate = harness.copy_bandwidth(options.device)
    config = presets.PRESETS[options.preset]().transformer
    heads = config.num_attention_heads
    versions: dict[str, Version] = {
        f"{options.device} kernel": partial(qk_norm_rope, backend=options.device),
        "torch eager": step_by_step,
        "torch.compile": torch.compile(step_by_step, dynamic=False),
    }
    rows = []
    for name, x, weight in cases(config, options.device):
        cos, sin = tables(config, x.shape[2], options.device)
        for what, run, passes in (("forward", forward, 2), ("forward + backward", forward_backward, 5)):
            exact = run(reference.qk_norm_rope, x.float(), weight.float(), cos, sin, heads)
            calls = {key: partial(run, version, x, weight, cos, sin, heads) for key, version in versions.items()}
            for key, call in calls.items():
                harness.check_close(exact, call(), TOLERANCE[x.dtype], key)
            times = harness.measure(calls, options.device, options.rounds)
            moved = passes * x.numel() * x.element_size()
            rows += [harness.row(f"{what}, {name}", key, times[key], moved, copy_rate) for key in versions]
    harness.show("qk_norm_rope", rows, options)


if __name__ == "__main__":
    main()
