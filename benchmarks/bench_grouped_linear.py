"""grouped_linear and grouped_linear_fp8 against torch's products, for every linear layer of a block.

    python benchmarks/bench_grouped_linear.py [--preset NAME] [--batches 1 2] [--device cpu|cuda]
                                              [--threads N] [--rounds N] [--save]

x `[4,M,in]` times weights `[4,out,in]`, with bias; the first layer of the feed-forward also with GELU. Versions take
turns, with a cold L2 cache; bench_gemm.py measures the products alone, without a pause. bfloat16 on a GPU, float32 on a
CPU. Making the rows of e4m3 is not timed. `times_the_first` is a version's time over the first's of its case.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping

import bench_gemm
import harness
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from u4d import presets
from u4d_fast import backend as backends
from u4d_fast.fp8 import Fp8Rows
from u4d_fast.ops.bias_gelu import bias_gelu
from u4d_fast.ops.grouped_linear import grouped_linear, grouped_linear_fp8
from u4d_fast.reference.grouped_linear import grouped_linear as reference_grouped_linear
from u4d_fast.reference.quantize_rows import quantize_rows
from u4d_fast.scaled_mm import scaled_mm_by_stream, takes_scaled_mm
from u4d_fast.time_layout import latent_frames

Versions = Mapping[str, Callable[[], Tensor]]


def by_stream(x: Tensor, weight: Tensor, bias: Tensor, with_gelu: bool) -> Tensor:
    """torch's linear layer in each stream."""
    out = torch.stack([linear(*parts) for parts in zip(x, weight, bias, strict=True)])
    return gelu(out, approximate="tanh") if with_gelu else out


def half_versions(x: Tensor, weight: Tensor, bias: Tensor, with_gelu: bool) -> Versions:
    """In the dtype of x: ours where it runs, then torch's."""
    device = x.device.type
    versions = {
        "baddbmm": lambda: reference_grouped_linear(x, weight, bias, with_gelu),
        "linear, stream by stream": lambda: by_stream(x, weight, bias, with_gelu),
    }
    if with_gelu:
        versions["bmm, bias_gelu"] = lambda: bias_gelu(torch.bmm(x, weight.mT), bias, inplace=True)
    if backends.unavailable("grouped_linear", device, 0):
        return versions
    return {"cuda kernel": lambda: grouped_linear(x, weight, bias, gelu=with_gelu, backend="cuda"), **versions}


def fp8_versions(x: Fp8Rows, weight: Fp8Rows, bias: Tensor, with_gelu: bool) -> Versions:
    """The same from rows of e4m3."""
    versions: dict[str, Callable[[], Tensor]] = {}
    if not backends.unavailable("grouped_linear_fp8", bias.device.type, 0):
        versions["fp8 cuda kernel"] = lambda: grouped_linear_fp8(x, weight, bias, gelu=with_gelu, backend="cuda")
    if takes_scaled_mm(x, weight, torch.bfloat16):
        versions["fp8 scaled_mm, stream by stream"] = lambda: scaled_mm_by_stream(x, weight, bias, with_gelu)
    return versions


def cases(config: presets.TransformerConfig, batches: list[int]) -> Iterator[tuple[bench_gemm.Layer, int, bool]]:
    """Every layer, its rows in a stream, and whether GELU follows."""
    height, width = (size // bench_gemm.TOKEN_PIXELS for size in config.image_size)
    tokens = latent_frames(config.num_frames) * height * width
    for batch in batches:
        for layer in bench_gemm.layers(config):
            yield layer, batch * tokens, False
            if layer.name == "ffn in":
                yield layer, batch * tokens, True


def measured(
    case: str,
    versions: Versions,
    expected: Tensor,
    tolerance: float,
    flops: float,
    options: argparse.Namespace,
    skipped: dict[str, str],
) -> list[harness.Row]:
    """Check the versions, time them in turns, and give each one's rate, and its time over the first's."""

    def check(name: str, call: Callable[[], Tensor]) -> None:
        error = float((call().float() - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise SystemExit(f"{case}, {name}: off by {error:g}: nothing was measured")

    versions = harness.agreeing(versions, check, skipped)
    times = harness.measure(versions, options.device, options.rounds)
    medians = {name: statistics.median(one) for name, one in times.items()}
    first = next(iter(medians.values()), 0.0)
    return [
        harness.row(
            case, name, times[name], tflop_per_s=flops / medians[name] / 1e9, times_the_first=medians[name] / first
        )
        for name in versions
    ]


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), help="whose shapes; wan-1.3b on a GPU, else tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], help="clips in one call")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = options.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = presets.PRESETS[options.preset or ("wan-1.3b" if device == "cuda" else "tiny")]().transformer
    rows, skipped = list[harness.Row](), dict[str, str]()
    for layer, length, with_gelu in cases(config, options.batches):
        x = torch.randn(bench_gemm.STREAMS, length, layer.inputs, device=device).to(dtype)
        weight = torch.randn(bench_gemm.STREAMS, layer.outputs, layer.inputs, device=device).to(dtype)
        weight /= layer.inputs**0.5
        bias = torch.randn(bench_gemm.STREAMS, layer.outputs, device=device).to(dtype)
        expected = reference_grouped_linear(x.float(), weight.float(), bias.float(), with_gelu)
        size = f"{bench_gemm.STREAMS} x {length} x {layer.inputs} x {layer.outputs}"
        case = f"{layer.name}{', GELU' if with_gelu else ''}: {size}"
        flops = 2.0 * x.numel() * layer.outputs
        quantised = quantize_rows(x), quantize_rows(weight), bias
        with torch.no_grad():
            for versions, tolerance in (
                (half_versions(x, weight, bias, with_gelu), bench_gemm.TOLERANCE),
                (fp8_versions(*quantised, with_gelu), bench_gemm.FP8_ERROR),
            ):
                rows += measured(case, versions, expected, tolerance, flops, options, skipped)
                harness.keep("grouped_linear", rows, options, skipped)
    harness.show("grouped_linear", rows, options, skipped)


if __name__ == "__main__":
    main()
