"""The peers: dense attention by every library that is here, and attention with group masks against FlexAttention.

    python benchmarks/bench_attention.py [--preset NAME] [--batches 1,2] [--only dense|masks] [--sustain 2]
                                         [--device cpu|cuda] [--threads N] [--seconds N] [--save]

Each version runs alone and without a pause for --sustain seconds (masks: half as long). The second batch takes only
backends within a factor of 2 of the fastest at the first. The backward pass is timed alone for dense attention, with
the forward pass for masks. TFLOP/s count products between tokens that see each other: 4 * pairs * heads * d forward,
2.5 times as many backward. bfloat16 on a GPU, float32 on a CPU.

The masks follow the training patterns (u4d.diffusion.patterns): groups that are context see context alone, so that
they could be computed once for all steps; groups that are wanted see everything; `one stream missing` leaves depth out
as keys. A group has 300 tokens, no multiple of FlexAttention's blocks of 128: its blocks that lie within groups are
taken whole or left out, those on a border ask a table of groups for each pair of tokens. Making that is not timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import cache, partial

import harness
import sustained
import torch
from torch import Tensor

import u4d_fast
from u4d import presets
from u4d.commands.attention_times import exact_rows
from u4d.diffusion.patterns import PATTERNS, context_groups
from u4d.train.cost.peaks import peak_flops
from u4d_fast.dense_attention import ATTENTION_BACKENDS, attention_backends, dense_attention
from u4d_fast.time_layout import latent_frames

STREAMS = 4
MISSING = 1  # depth
TOKEN_PIXELS = 16  # a patch is 2x2 latent cells of 8x8 pixels
BACKWARD_FLOPS = 2.5  # five products of the size of the forward pass's two
SLOWEST = 2.0  # times the fastest, for a backend to be measured with another batch
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
ROWS = 64

Call = Callable[[], object]
Version = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[[Version, tuple[Tensor, ...]], tuple[Tensor, ...]]


class Peers:
    """Rows, and what could not be measured, as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = presets.PRESETS[options.preset or ("wan-1.3b" if options.device == "cuda" else "tiny")]().transformer
        self.options, self.device, self.sustain = options, options.device, options.sustain
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.frames = latent_frames(config.num_frames)
        self.group_size = (config.image_size[0] // TOKEN_PIXELS) * (config.image_size[1] // TOKEN_PIXELS)
        self.tokens = STREAMS * self.frames * self.group_size
        self.heads, self.width = config.num_attention_heads, config.attention_head_dim
        self.peak = peak_flops(options.device)
        self.rows: list[harness.Row] = []
        self.skipped: dict[str, str] = {}

    def qkv(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same random numbers every time."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, self.tokens, self.heads, self.width)
        q, k, v = (torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(3))
        return q, k, v

    def flops(self, batch: int) -> float:
        return 4.0 * batch * self.heads * self.tokens**2 * self.width

    def measure(self, case: str, version: str, call: Call, flops: float, seconds: float, **notes: float) -> float:
        """Add a row; returns the median in milliseconds."""
        times, state = sustained.measure_sustained(call, self.device, seconds)
        rate = flops / (statistics.median(times) * 1e-3)
        notes["tflop_per_s"] = rate / 1e12
        if self.peak:
            notes["of_peak"] = rate / self.peak
        self.rows.append(harness.row(case, version, times, **notes, **state))
        harness.keep("attention", self.rows, self.options, self.skipped)
        return self.rows[-1].ms

    def dense(self, batches: list[int]) -> None:
        """Every backend, forward and backward."""
        chosen = list(ATTENTION_BACKENDS)
        for batch in batches:
            q, k, v = self.qkv(batch)
            rows = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(1))[:ROWS].to(self.device)
            expected = exact_rows(q, k, v, rows)
            reasons = attention_backends(q, k, v)
            medians: dict[str, float] = {}
            for name in chosen:
                if reasons[name]:
                    self.skipped[name] = reasons[name]
                    continue
                try:
                    medians[name] = self.one_backend(name, batch, (q, k, v), rows, expected)
                except Exception as error:  # a library that breaks here is one that is not measured
                    self.skipped[f"{name}, batch {batch}"] = harness.reason_of(error)
                    torch.cuda.empty_cache()  # it may have been too large for the memory
            chosen = [name for name, ms in medians.items() if ms <= SLOWEST * min(medians.values())]

    def one_backend(self, name: str, batch: int, qkv: tuple[Tensor, ...], rows: Tensor, expected: Tensor) -> float:
        """Its forward and its backward pass; the median of the forward pass."""
        shape = f"{batch} x {self.tokens} x {self.heads} x {self.width}"
        version, flops = ("u4d kernel" if name == "u4d" else name), self.flops(batch)
        with torch.no_grad():
            found = dense_attention(*qkv, backend=name)[:, rows].double()
            error = relative_distance(found, expected)
            if not error <= TOLERANCE[self.dtype]:
                raise ValueError(f"off by {error:g}")
            forward = partial(dense_attention, *qkv, backend=name)
            ms = self.measure(f"{shape}, forward", version, forward, flops, self.sustain, error=error)
        leaves = [x.detach().requires_grad_() for x in qkv]
        attended = dense_attention(*leaves, backend=name)
        backward = partial(torch.autograd.grad, attended, leaves, torch.randn_like(attended), retain_graph=True)
        self.measure(f"{shape}, backward", version, backward, BACKWARD_FLOPS * flops, self.sustain)
        return ms

    def masks(self) -> None:
        """Ours against FlexAttention, batch 1."""
        qkv = self.qkv(1)
        active = u4d_fast.info()["ops"]["multi_stream_attention"][self.device]["backend"]
        by_kernel = active == self.device  # in the forward pass; with gradients our op chooses for itself
        for name, mask in pattern_masks(self.frames).items():
            ours = partial(u4d_fast.multi_stream_attention, group_size=self.group_size, group_mask=mask)
            others: dict[str, Version] = {}
            try:
                others[flex_name(self.device)] = flex_version(mask, self.group_size, self.tokens, self.device)
            except Exception as error:
                self.skipped["FlexAttention"] = harness.reason_of(error)
            flops = self.flops(1) * mask.double().mean().item()
            for what, ours_name, run, work in (
                ("forward", "u4d kernel" if by_kernel else "u4d reference", harness.forward, flops),
                ("forward + backward", "u4d", harness.forward_backward, (1 + BACKWARD_FLOPS) * flops),
            ):
                self.masked_case(f"mask {name}", what, {ours_name: ours, **others}, run, qkv, work)

    def masked_case(
        self, mask: str, what: str, versions: dict[str, Version], run: Run, qkv: tuple[Tensor, ...], flops: float
    ) -> None:
        """Time the versions that agree with the first one."""
        expected: tuple[Tensor, ...] = ()
        for version, call in versions.items():
            try:
                found = run(call, qkv)
            except Exception as error:
                self.skipped[f"{version}, {what}"] = harness.reason_of(error)
                continue
            expected = expected or found
            apart = max(relative_distance(a, b) for a, b in zip(found, expected, strict=True))
            if not apart <= TOLERANCE[self.dtype]:
                self.skipped[f"{version}, {mask}, {what}"] = f"off by {apart:g}"
                continue
            self.measure(f"{mask}, {what}", version, partial(run, call, qkv), flops, self.sustain / 2)


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """Of two tensors, as L2 norms; 0 where both are zero."""
    apart, size = (float(x.double().norm()) for x in (found.double() - expected.double(), expected))
    return apart / size if size else apart


def pattern_masks(frames: int) -> dict[str, Tensor]:
    """`[1,G,G]` on the CPU, where reading them costs no synchronisation: who sees whom, by training pattern."""
    available = torch.ones(len(PATTERNS), STREAMS, dtype=torch.bool)
    history = torch.full((len(PATTERNS),), max(1, frames // 2))
    context = context_groups(torch.arange(len(PATTERNS)), available, frames, history).flatten(1)
    masks = {name: (~one[:, None] | one)[None] for name, one in zip(PATTERNS, context, strict=True)}
    exists = torch.arange(STREAMS).repeat_interleave(frames) != MISSING
    return {**masks, "one stream missing": exists.expand(len(exists), -1)[None].clone()}


def flex_name(device: str) -> str:
    return "FlexAttention, compiled" if device == "cuda" else "FlexAttention, not compiled"


def flex_version(mask: Tensor, size: int, tokens: int, device: str) -> Version:
    """FlexAttention with this group mask; compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pairs = mask.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pairs[batch, query // size, key // size]

    block_mask = create_block_mask(sees, mask.shape[0], None, tokens, tokens, device=device)
    attention = compiled_flex() if device == "cuda" else flex_attention

    def version(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask)
        return attended.transpose(1, 2)

    return version


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """One compiled function for all masks, which are its arguments."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def main() -> None:
    parser = sustained.arguments(__doc__.splitlines()[0], seconds=2.0)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), help="whose shapes; wan-1.3b on a GPU, else tiny")
    parser.add_argument("--batches", default="1,2", help="clips in one call of dense attention")
    parser.add_argument("--only", choices=("dense", "masks"), help="leave the other part out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = Peers(options)
    if options.only != "masks":
        peers.dense([int(batch) for batch in options.batches.split(",")])
    if options.only != "dense":
        peers.masks()
    harness.show("attention", peers.rows, options, peers.skipped)


if __name__ == "__main__":
    main()
