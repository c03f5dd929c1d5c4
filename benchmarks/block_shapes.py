"""Shapes of a transformer block's activations and tables, for the benchmarks of its element-wise ops."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import harness
import torch
from torch import Tensor

from u4d import presets
from u4d_fast.time_layout import latent_frames

STREAMS = 4
TOKEN_PIXELS = 16  # a patch is 2x2 latent cells of 8x8 pixels
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """Activations `[4,batch,frames*patches,width]` of one dtype."""

    batch: int
    frames: int
    patches: int
    width: int
    hidden: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"B={self.batch} F={self.frames} P={self.patches}, {dtype}"

    def activations(self, count: int, width: int | None = None) -> list[Tensor]:
        """Random rows, `width` columns or the model's."""
        generator = torch.Generator().manual_seed(0)
        shape = (STREAMS, self.batch, self.frames * self.patches, width or self.width)
        return [torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(count)]

    def tables(self, count: int) -> tuple[Tensor, ...]:
        """The first `count` of a block's six float32 tables, which lie beside each other in memory."""
        generator = torch.Generator().manual_seed(1)
        six = torch.randn(STREAMS, self.batch, self.frames, 6, self.width, generator=generator).to(self.device)
        return six.unbind(-2)[:count]


def parse(description: str) -> argparse.Namespace:
    """The options of all benchmarks, and whose shapes."""
    parser = harness.arguments(description)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="wan-1.3b", help="whose shapes")
    parser.add_argument("--batches", type=int, nargs="+", help="clips in one call; 1 and 2 on a GPU, else 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Both dtypes at every batch size."""
    config = presets.PRESETS[options.preset]().transformer
    height, width = config.image_size
    patches = (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
    channels = config.num_attention_heads * config.attention_head_dim
    for batch in options.batches or ([1, 2] if options.device == "cuda" else [1]):
        for dtype in (torch.bfloat16, torch.float32):
            frames = latent_frames(config.num_frames)
            yield Case(batch, frames, patches, channels, config.ffn_dim, dtype, options.device)


def rows(
    case: Case,
    versions: Mapping[str, Callable[[], tuple[Tensor, ...]]],
    exact: tuple[Tensor, ...],
    moved_bytes: int,
    copy_rate: float,
    rounds: int,
) -> list[harness.Row]:
    """Check the versions against float64, time them in turns, and give each one's time over the first's."""
    for name, call in versions.items():
        harness.check_close(exact, call(), TOLERANCE[case.dtype], name)
    times = harness.measure(versions, case.device, rounds)
    made = [harness.row(str(case), name, times[name], moved_bytes, copy_rate) for name in versions]
    for one in made:
        one.notes["times_the_kernel"] = one.ms / made[0].ms
    return made
