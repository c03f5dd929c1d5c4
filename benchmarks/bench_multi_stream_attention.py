"""multi_stream_attention against torch's attention with the group mask expanded to tokens, forward and backward.

    python benchmarks/bench_multi_stream_attention.py [--preset NAME] [--batch 1] [--device cpu|cuda]
                                                      [--threads N] [--rounds N] [--save]

The cases are no mask, one stream missing (a mask `[B,G]`) and streams that see themselves alone (`[B,G,G]`). The token
mask is made before the clock starts; `mask_mb` is its size. TFLOP/s counts products between tokens that see each other:
4 * pairs * heads * d forward, and 2.5 times as many more backward. bfloat16 on a GPU, float32 on a CPU.

"group mask" is what a caller gets. On a Hopper GPU "kernel" and "reference" are the choices by name, so that the dense
case can be decided by what it measures (DENSE_BY_KERNEL in u4d_fast/ops/multi_stream_attention.py) and the masked ones
be compared per executed FLOP with the dense one. The kernels of the gradient compute the scores and their gradients
twice: `executed_tflop_per_s` counts 3.5 times as many products backward as forward.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import harness
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from u4d import presets
from u4d_fast import backend as backends
from u4d_fast import multi_stream_attention
from u4d_fast.time_layout import latent_frames

STREAMS = 4
MISSING = 1  # depth
TOKEN_PIXELS = 16  # a patch is 2x2 latent cells of 8x8 pixels
BACKWARD_FLOPS = 2.5  # five products of the size of the forward pass's two
EXECUTED_BACKWARD = 3.5  # seven: those of keys and those of queries each compute two of the five for themselves
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

Version = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_qkv(config: presets.TransformerConfig, batch: int, device: str) -> tuple[tuple[Tensor, ...], int]:
    """Random queries, keys and values, `[B,T,heads,d]`, and the tokens of a group."""
    size = (config.image_size[0] // TOKEN_PIXELS) * (config.image_size[1] // TOKEN_PIXELS)
    tokens = STREAMS * latent_frames(config.num_frames) * size
    shape = (batch, tokens, config.num_attention_heads, config.attention_head_dim)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)), size


def make_masks(batch: int, frames: int) -> dict[str, Tensor | None]:
    """Group masks on the CPU, where reading them costs no synchronisation."""
    stream = torch.arange(STREAMS).repeat_interleave(frames)
    return {
        "no mask": None,
        "one stream missing": (stream != MISSING).expand(batch, -1),
        "own stream": (stream[:, None] == stream).expand(batch, -1, -1),
    }


def expand_mask(mask: Tensor | None, size: int, device: str) -> Tensor | None:
    """The same visibility between tokens, as torch's attention takes it: `[B,1,1 or T,T]`."""
    if mask is None:
        return None
    tokens = mask.repeat_interleave(size, -1)
    tokens = tokens[:, None] if mask.ndim == 2 else tokens.repeat_interleave(size, 1)
    return tokens.expand(-1, tokens.shape[-1], -1)[:, None].contiguous().to(device)


def masked(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None) -> Tensor:
    """torch's attention, in the layout of the op."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=token_mask).transpose(1, 2)


def parse(description: str) -> tuple[argparse.Namespace, presets.Preset]:
    """The options, and whose shapes."""
    parser = harness.arguments(description)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), help="whose shapes; wan-1.3b on a GPU, else tiny")
    parser.add_argument("--batch", type=int, default=1, help="clips in one call")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options, presets.PRESETS[options.preset or ("wan-1.3b" if options.device == "cuda" else "tiny")]()


def main() -> None:
    options, preset = parse(__doc__.splitlines()[0])
    qkv, size = make_qkv(preset.transformer, options.batch, options.device)
    rows = []
    for name, mask in make_masks(options.batch, latent_frames(preset.transformer.num_frames)).items():
        token_mask = expand_mask(mask, size, options.device)
        versions: dict[str, Version] = {
            "group mask": partial(multi_stream_attention, group_size=size, group_mask=mask),
            "torch, token mask": partial(masked, token_mask=token_mask),
        }
        by_name: dict[str, Version] = {}
        if options.device == "cuda" and not backends.unavailable("multi_stream_attention", "cuda", 0):
            for version, backend in (("kernel", "cuda"), ("reference", "reference")):
                by_name[version] = partial(versions["group mask"], backend=backend)
        seen = 1.0 if token_mask is None else token_mask.double().mean().item()
        flops = 4 * seen * qkv[0].numel() * qkv[0].shape[1]
        mask_mb = {"torch, token mask": 0.0 if token_mask is None else token_mask.numel() / 1e6}
        for what, run, backward, executed in (
            ("forward", harness.forward, 0.0, 0.0),
            ("forward + backward", harness.forward_backward, BACKWARD_FLOPS, EXECUTED_BACKWARD),
        ):
            calls = {version: partial(run, call, qkv) for version, call in (versions | by_name).items()}
            for call in calls.values():
                harness.check_close(calls["torch, token mask"](), call(), TOLERANCE[qkv[0].dtype], name)
            times = harness.measure(calls, options.device, options.rounds)
            for version in calls:
                speed = flops / (statistics.median(times[version]) * 1e-3) / 1e12
                case = f"{preset.name} x {options.batch}, {name}, {what}"
                measured = {"tflop_per_s": (1 + backward) * speed, "mask_mb": mask_mb.get(version, 0.0)}
                if version == "kernel":
                    measured["executed_tflop_per_s"] = (1 + executed) * speed
                rows.append(harness.row(case, version, times[version], **measured))
    harness.show("multi_stream_attention", rows, options)


if __name__ == "__main__":
    main()
