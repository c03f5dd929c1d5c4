"""The products of every linear layer, one weight per stream: batched, stream by stream, and in fp8.

    python benchmarks/bench_gemm.py [--preset NAME] [--batches 1,2] [--sustain 1] [--device cpu|cuda] [--threads N]
                                    [--seconds N] [--save]

x `[4,M,in]` times weights `[4,out,in]`, M = batch * tokens of a stream. `of_square` is the share of what one large
square product reaches in the same run and dtype; fp8 products are held against an fp8 square. bfloat16 on a GPU,
float32 on a CPU. In fp8 every row of x and every output channel has a scale of its own; making the scales is not timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import harness
import sustained
import torch
from torch import Tensor

from u4d import presets
from u4d_fast.fp8 import Fp8Rows
from u4d_fast.ops.grouped_linear import grouped_linear, grouped_linear_fp8
from u4d_fast.time_layout import latent_frames

STREAMS = 4
TOKEN_PIXELS = 16  # a patch is 2x2 latent cells of 8x8 pixels
SQUARE = {"cuda": 8192, "cpu": 1024}
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
TOLERANCE = 3e-2
FP8_ERROR = 6e-2  # relative L2; three bits of mantissa, both factors rounded


@dataclass(frozen=True)
class Layer:
    """A linear layer of the transformer."""

    name: str
    inputs: int
    outputs: int


def layers(config: presets.TransformerConfig) -> list[Layer]:
    """Every shape that the blocks have."""
    width = config.num_attention_heads * config.attention_head_dim
    return [
        Layer("q, k, v together", width, 3 * width),
        Layer("q, k, v, o, cross q, cross o", width, width),
        Layer("ffn in", width, config.ffn_dim),
        Layer("ffn out", config.ffn_dim, width),
    ]


def half_versions(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """In the dtype of x: ours, torch's batched product without and with bias, stream by stream, torch's grouped."""
    return {
        "ours": lambda: grouped_linear(x, weight, bias, backend="cuda"),
        "bmm": lambda: torch.bmm(x, weight.mT),
        "baddbmm": lambda: torch.baddbmm(bias[:, None], x, weight.mT),
        "addmm, stream by stream": lambda: by_stream(x, weight, bias),
        "grouped_mm": lambda: torch._grouped_mm(x, weight.mT),
    }


def by_stream(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One product after the other, each into its place."""
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    for place, a, w, b in zip(out, x, weight, bias, strict=True):
        torch.addmm(b, a, w.mT, out=place)
    return out


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[...,M,K]` -> fp8 of the same shape and float32 scales `[...,M,1]`, one per row."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / FP8_MAX
    return (x.float() / scale).to(FP8), scale


def fp8_versions(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same products from fp8 factors, without bias."""
    (a, a_scale), (w, w_scale) = to_fp8(x), to_fp8(weight)
    by_row = {"out_dtype": torch.bfloat16, "use_fast_accum": True}

    def scaled_by_stream() -> Tensor:
        out = x.new_empty(*x.shape[:2], weight.shape[1], dtype=torch.bfloat16)
        for s in range(len(a)):
            out[s] = torch._scaled_mm(a[s], w[s].mT, scale_a=a_scale[s], scale_b=w_scale[s].mT, **by_row)
        return out

    def grouped() -> Tensor:
        scales = a_scale.squeeze(-1).contiguous(), w_scale.squeeze(-1).contiguous()
        return torch._scaled_grouped_mm(a, w.mT, *scales, **by_row)

    rows = Fp8Rows(a, a_scale.squeeze(-1).contiguous()), Fp8Rows(w, w_scale.squeeze(-1).contiguous())
    return {
        "fp8 ours": lambda: grouped_linear_fp8(*rows, backend="cuda"),
        "fp8 scaled_mm, stream by stream": scaled_by_stream,
        "fp8 scaled_grouped_mm": grouped,
    }


def square_products(size: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Tensor]]:
    """One large product in `dtype`, and one in fp8 with one scale for each factor."""
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a, w, one = x.to(FP8), weight.to(FP8), torch.ones((), device=device)
    fp8 = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return {
        "mm": lambda: x @ weight.mT,
        "fp8 scaled_mm": lambda: torch._scaled_mm(a, w.mT, scale_a=one, scale_b=one, **fp8),
    }


class Products:
    """Rows, and what could not be measured, as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.sustain = options, options.device, options.sustain
        self.rows: list[harness.Row] = []
        self.skipped: dict[str, str] = {}
        self.best: dict[bool, float] = {}  # FLOP/s of the square product; the key: is it fp8

    def measure(
        self, case: str, version: str, call: Callable[[], Tensor], flops: float, expected: Tensor | None
    ) -> None:
        """Time one version, if it can run here and is right."""
        if version in self.skipped:
            return
        in_fp8 = version.startswith("fp8")
        try:
            found = call()
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            self.skipped[version] = harness.reason_of(error).split(". ")[0]
            return
        if expected is not None:
            error = float((found.float() - expected.float()).norm() / expected.float().norm())
            if not error <= (FP8_ERROR if in_fp8 else TOLERANCE):
                raise SystemExit(f"{case}, {version}: off by {error:g}: nothing was measured")
        times, notes = sustained.measure_sustained(call, self.device, self.sustain)
        rate = flops / (statistics.median(times) * 1e-3)
        if expected is None:
            self.best[in_fp8] = rate
        notes["tflop_per_s"] = rate / 1e12
        if in_fp8 in self.best:
            notes["of_square"] = rate / self.best[in_fp8]
        self.rows.append(harness.row(case, version, times, **notes))
        harness.keep("gemm", self.rows, self.options, self.skipped)


def main() -> None:
    parser = sustained.arguments(__doc__.splitlines()[0], seconds=1.0)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), help="whose shapes; wan-1.3b on a GPU, else tiny")
    parser.add_argument("--batches", default="1,2", help="clips in one call; 2: both guidance branches together")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = presets.PRESETS[options.preset or ("wan-1.3b" if options.device == "cuda" else "tiny")]().transformer
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    height, width = (size // TOKEN_PIXELS for size in config.image_size)
    tokens = latent_frames(config.num_frames) * height * width
    products = Products(options)
    size = SQUARE[options.device]
    for version, call in square_products(size, dtype, options.device).items():
        products.measure(f"{size} x {size} x {size}", version, call, 2.0 * size**3, None)
    for batch in map(int, options.batches.split(",")):
        for layer in layers(config):
            x = torch.randn(STREAMS, batch * tokens, layer.inputs, device=options.device).to(dtype)
            weight = torch.randn(STREAMS, layer.outputs, layer.inputs, device=options.device).to(dtype)
            bias = torch.zeros(STREAMS, layer.outputs, device=options.device, dtype=dtype)
            expected, flops = torch.bmm(x, weight.mT), 2.0 * x.numel() * layer.outputs
            case = f"{layer.name}: {STREAMS} x {batch * tokens} x {layer.inputs} x {layer.outputs}"
            for version, call in {**half_versions(x, weight, bias), **fp8_versions(x, weight)}.items():
                products.measure(case, version, call, flops, expected)
    harness.show("gemm", products.rows, options, products.skipped)


if __name__ == "__main__":
    main()
