"""rms_norm, forward and backward, against the reference in eager torch and under torch.compile, and torch's own norm.

    python benchmarks/bench_rms_norm.py [--preset NAME] [--device cpu|cuda] [--threads N] [--rounds N] [--save]

The activations of one transformer block, `[S,B,T,D]`, for one clip and for two (both guidance branches). GB/s counts
one read and one write of the activations, and for the gradients two more reads and one more write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import harness
import torch
from torch import Tensor

from u4d import presets
from u4d_fast import reference, rms_norm
from u4d_fast.time_layout import latent_frames

STREAMS = 4
TOKEN_PIXELS = 16  # a patch is 2x2 latent cells of 8x8 pixels
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Version = Callable[[Tensor, Tensor], Tensor]


def token_shape(config: presets.TransformerConfig, batch: int) -> tuple[int, int, int, int]:
    """Sizes of a block's activations."""
    height, width = config.image_size
    tokens = latent_frames(config.num_frames) * (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
    return STREAMS, batch, tokens, config.num_attention_heads * config.attention_head_dim


def cases(config: presets.TransformerConfig, device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, x, weight) in every dtype and batch size; a CPU is spared the second clip."""
    g = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for batch in (1, 2) if device == "cuda" else (1,):
            shape = token_shape(config, batch)
            x = torch.randn(shape, generator=g).to(device, dtype)
            weight = torch.rand(STREAMS, shape[-1], generator=g).to(device, dtype)
            yield f"{list(shape)} {str(dtype).removeprefix('torch.')}", x, weight


def torchs_own(x: Tensor, weight: Tensor) -> Tensor:
    """torch's fused norm knows one weight: the streams' weights are multiplied to its result."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * weight[:, None, None]


def forward(version: Version, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (version(x, weight),)


def forward_backward(version: Version, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x and weight; x itself is the gradient of the result."""
    leaves = (x.detach().requires_grad_(), weight.detach().requires_grad_())
    return torch.autograd.grad(version(*leaves), leaves, x)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="wan-1.3b", help="whose shapes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    copy_rate = harness.copy_bandwidth(options.device)
    versions: dict[str, Version] = {
        f"{options.device} kernel": partial(rms_norm, backend=options.device),
        "torch eager": reference.rms_norm,
        "torch.compile": torch.compile(reference.rms_norm, dynamic=False),
        "F.rms_norm * weight": torchs_own,
    }
    rows = []
    for name, x, weight in cases(presets.PRESETS[options.preset]().transformer, options.device):
        for what, run, passes in (("forward", forward, 2), ("forward + backward", forward_backward, 5)):
            exact = run(reference.rms_norm, x.float(), weight.float())
            calls = {key: partial(run, version, x, weight) for key, version in versions.items()}
            for key, call in calls.items():
                harness.check_close(exact, call(), TOLERANCE[x.dtype], key)
            times = harness.measure(calls, options.device, options.rounds)
            moved = passes * x.numel() * x.element_size()
            rows += [harness.row(f"{what}, {name}", key, times[key], moved, copy_rate) for key in versions]
    harness.show("rms_norm", rows, options)


if __name__ == "__main__":
    main()
