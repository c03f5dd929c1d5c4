"""Attention from 8-bit numbers, with and without the quantisation, against our bfloat16 kernel and cuDNN; with errors.

    python benchmarks/bench_multi_stream_attention_fp8.py [--preset NAME] [--batch 1] [--device cpu|cuda]
                                                          [--threads N] [--rounds N] [--save]

"fp8" is what a caller gets; "fp8, attention" leaves out the quantisation of q, k and v, "fp8, quantisation" is that
alone. TFLOP/s counts products between tokens that see each other: 4 * pairs * heads * d. `error` is the relative L2
error against float64 on some queries of each head, on the same random numbers (bfloat16, normal); real activations have
outliers and means, so a model's own error must be measured on the model. On a CPU the specifications are timed, which
says nothing about kernels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import harness
import torch
from bench_multi_stream_attention import make_masks, make_qkv, parse
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast import multi_stream_attention
from u4d_fast.attention_inputs import mask_on
from u4d_fast.dense_attention import dense_attention
from u4d_fast.ops import multi_stream_attention_fp8 as fp8
from u4d_fast.time_layout import latent_frames

ROWS = 64
FP8, BFLOAT16 = 0.08, 0.02  # the most error with which a version is timed

Call = Callable[[], object]


def exact_rows(qkv: tuple[Tensor, ...], rows: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """The attention of these queries in float64, `[B,rows,heads,d]`; each of them sees something."""
    q, k, v = qkv
    heads = []
    for head in range(q.shape[2]):
        scores = q[:, rows, head].double() @ k[:, :, head].double().mT / math.sqrt(q.shape[3])
        if mask is not None:
            seen = mask.to(q.device)
            seen = seen[:, rows // size] if mask.ndim == 3 else seen[:, None]
            scores = scores.masked_fill(~seen.repeat_interleave(size, -1), -math.inf)
        heads.append(torch.softmax(scores, -1) @ v[:, :, head].double())
    return torch.stack(heads, 2)


def relative_error(call: Call, rows: Tensor, exact: Tensor) -> float:
    attended = call()
    assert isinstance(attended, Tensor)
    return float((attended[:, rows].double() - exact).norm() / exact.norm())


def make_calls(qkv: tuple[Tensor, ...], size: int, mask: Tensor | None) -> tuple[dict[str, Call], dict[str, Call]]:
    """What is timed: versions of the whole, each with its result; and parts of ours."""
    q, k, v = qkv
    whole: dict[str, Call] = {"fp8": partial(fp8.multi_stream_attention_fp8, q, k, v, size, mask)}
    parts: dict[str, Call] = {}
    if q.device.type == "cuda" and not backends.unavailable(fp8.OP, "cuda", 0):
        there = mask_on(q.device, mask)
        quantized = fp8.quantize_for_kernel(q, k, v, size, there)
        parts["fp8, attention"] = partial(fp8.attend_quantized, quantized, size, there)
        parts["fp8, quantisation"] = partial(fp8.quantize_for_kernel, q, k, v, size, there)
        whole["bfloat16"] = partial(multi_stream_attention, q, k, v, size, mask, backend="cuda")
    if mask is None:
        cudnn = "torch-cudnn" if q.device.type == "cuda" else "torch"
        whole[cudnn] = partial(dense_attention, q, k, v, backend=cudnn)
    return whole, parts


def main() -> None:
    options, preset = parse(__doc__.splitlines()[0])
    qkv, size = make_qkv(preset.transformer, options.batch, options.device)
    tokens = qkv[0].shape[1]
    queries = torch.linspace(0, tokens - 1, ROWS, device=options.device).long()
    rows = []
    for name, mask in make_masks(options.batch, latent_frames(preset.transformer.num_frames)).items():
        exact = exact_rows(qkv, queries, size, mask)
        whole, parts = make_calls(qkv, size, mask)
        errors = {version: relative_error(call, queries, exact) for version, call in whole.items()}
        for version, error in errors.items():
            if not error <= (FP8 if version == "fp8" else BFLOAT16):
                raise SystemExit(f"{name}, {version}: the error is {error:g}: nothing was measured")
        flops = 4 * (1.0 if mask is None else mask.double().mean().item()) * qkv[0].numel() * tokens
        times = harness.measure(whole | parts, options.device, options.rounds)
        for version, measured in times.items():
            notes = {"error": errors[version]} if version in errors else {}
            if version != "fp8, quantisation":
                notes["tflop_per_s"] = flops / (statistics.median(measured) * 1e-3) / 1e12
            rows.append(harness.row(f"{preset.name} x {options.batch}, {name}", version, measured, **notes))
    harness.show("multi_stream_attention_fp8", rows, options)


if __name__ == "__main__":
    main()
