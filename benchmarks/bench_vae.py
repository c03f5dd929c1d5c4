"""Wan2.1's VAE in large chunks against diffusers' own passes, and its convolutions alone.

    python benchmarks/bench_vae.py [--dtype bfloat16|float16|float32 ...] [--compile] [--no-convolutions]
                                   [--device cpu|cuda] [--threads N] [--rounds N] [--save]

Encoding and decoding of RGB and depth. On a GPU the full VAE at 50 frames of 240x320, by default in bfloat16; on a CPU
a third of its width at 10 frames of 48x64, in float32 (with one thread torch has only a slow conv3d for small sizes).
Weights are random, TF32 is off. A version may be off from diffusers in float32 by no more than twice what diffusers
itself is off in that type. `tflop_per_s` counts the products of the convolutions and of attention. `--compile`: also
diffusers' encoder and decoder under torch.compile, which takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv3d
from torch.utils.flop_counter import FlopCounterMode

import u4d_fast
from u4d.model.wan_codec import WanCodec

FLOAT32_TOLERANCE = 1e-4
STREAMS = {"rgb": 3, "depth": 1}


@dataclass(frozen=True)
class Case:
    """Sizes of a VAE and of a clip."""

    name: str
    base_dim: int
    frames: int
    height: int
    width: int
    dtypes: tuple[str, ...]

    def clips(self, device: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (self.height, self.width)
        return {
            stream: (2 * torch.rand(1, self.frames, channels, *shape, generator=generator) - 1).to(device)
            for stream, channels in STREAMS.items()
        }

    def convolutions(self) -> Iterator[tuple[int, int, int, int, int]]:
        """(inputs, outputs, frames, height, width) of a decoder's block at each level, and at the pictures' ends."""
        for factor, slower, smaller in ((1, 1, 1), (2, 1, 2), (4, 2, 4), (4, 4, 8)):
            size = 1 + (self.frames - 2) // slower, self.height // smaller, self.width // smaller
            yield factor * self.base_dim, factor * self.base_dim, *size
        yield 3, self.base_dim, self.frames - 1, self.height, self.width
        yield self.base_dim, 3, self.frames - 1, self.height, self.width


FULL = Case("wan2.1 vae, 50 frames of 240x320", 96, 50, 240, 320, ("bfloat16",))
SMALL = Case("a third as wide, 10 frames of 48x64", 32, 10, 48, 64, ("float32",))


# --- versions --------------------------------------------------------------------------------------------------------


def make_vae(case: Case, device: str, dtype: torch.dtype) -> Any:
    """Random weights, the same for every type."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    with torch.device(device):
        return AutoencoderKLWan(base_dim=case.base_dim).eval().to(dtype)


def channels_last(vae: Any) -> Any:
    """Weights laid out so that convolutions take and give channels last."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d):
            three = isinstance(module, torch.nn.Conv3d)
            layout = torch.channels_last_3d if three else torch.channels_last
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return vae


@contextmanager
def best_algorithms(wanted: bool) -> Iterator[None]:
    """cuDNN tries its algorithms for each new shape."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Version:
    """A codec, and how it runs."""

    codec: WanCodec
    backend: Any = "auto"
    try_algorithms: bool = False

    def encode(self, clips: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad(), u4d_fast.use_backend(self.backend), best_algorithms(self.try_algorithms):
            return tuple(self.codec.encode(clip, stream) for stream, clip in clips.items())

    def decode(self, latents: tuple[Tensor, ...], frames: int) -> tuple[Tensor, ...]:
        with torch.no_grad(), u4d_fast.use_backend(self.backend), best_algorithms(self.try_algorithms):
            return tuple(self.codec.decode(x, stream, frames) for x, stream in zip(latents, STREAMS, strict=True))


def versions(case: Case, device: str, dtype: torch.dtype, compiled: bool) -> dict[str, Version]:
    """The first, diffusers' own passes, is the others' measure: what they can't do costs it nothing."""
    vae = make_vae(case, device, dtype)
    found = {
        "diffusers": Version(WanCodec(vae, in_chunks=False)),
        f"chunks, {device} kernel": Version(WanCodec(vae)),
        "chunks, plain torch": Version(WanCodec(vae), "reference"),
        "diffusers, channels last": Version(WanCodec(channels_last(make_vae(case, device, dtype)), in_chunks=False)),
    }
    if device == "cuda":
        found["chunks, kernel, cudnn.benchmark"] = Version(WanCodec(vae), try_algorithms=True)
    if compiled:
        twin = make_vae(case, device, dtype)
        twin.encoder, twin.decoder = torch.compile(twin.encoder), torch.compile(twin.decoder)
        found["diffusers, compiled"] = Version(WanCodec(twin, in_chunks=False))
    return found


def check(
    errors: dict[str, float],
    theirs: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
    name: str,
    call: Callable[[], tuple[Tensor, ...]],
) -> None:
    """Put a version's relative error against float32 into `errors`.

    Raises:
        SystemExit: it is more than twice that of diffusers.
    """
    error, allowed = relative(call(), truth), max(2 * relative(theirs, truth), FLOAT32_TOLERANCE)
    if not error <= allowed:
        raise SystemExit(f"{name}: off by {error:g}, allowed {allowed:g}: nothing was measured")
    errors[name] = error


def relative(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, truth, strict=True))


# --- measurements ----------------------------------------------------------------------------------------------------


def flops(case: Case) -> dict[str, int]:
    """Of encoding and of decoding both streams."""
    version, counts = Version(WanCodec(make_vae(case, "meta", torch.float32))), {}
    clips = {stream: clip.to("meta") for stream, clip in case.clips("cpu").items()}
    latents = version.encode(clips)
    for what, call in calls(version, clips, latents, case).items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[what] = counter.get_total_flops()
    return counts


def calls(
    version: Version, clips: dict[str, Tensor], latents: tuple[Tensor, ...], case: Case
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    return {
        "encode": partial(version.encode, clips),
        "decode": partial(version.decode, latents, case.frames),
    }


def peak_notes(call: Callable[[], object], device: str) -> dict[str, float | str]:
    """What a call takes of a GPU's memory beside what is there."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return {"peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9}


class Bench:
    """Rows, and what could not be measured, as they come."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        self.rows, self.skipped = list[harness.Row](), dict[str, str]()

    def measure_vae(self, dtype: torch.dtype) -> None:
        """Every version of both directions in one type."""
        case, device, work = self.case, self.options.device, flops(self.case)
        clips = case.clips(device)
        exact = Version(WanCodec(make_vae(case, device, torch.float32), in_chunks=False))
        latents = exact.encode(clips)
        truth = {what: call() for what, call in calls(exact, clips, latents, case).items()}
        del exact
        compared = versions(case, device, dtype, self.options.compile)
        for what, true in truth.items():
            each = {name: calls(version, clips, latents, case)[what] for name, version in compared.items()}
            errors = dict[str, float]()
            right = harness.agreeing(each, partial(check, errors, each["diffusers"](), true), self.skipped)
            peaks = {name: peak_notes(call, device) for name, call in right.items()}
            times = harness.measure(right, device, self.options.rounds, warmup=1)
            for name in right:
                rate = work[what] / (statistics.median(times[name]) * 1e-3) / 1e12
                notes = {"tflop_per_s": rate, "error": errors[name], **peaks[name]}
                self.add(f"{what} rgb and depth, {case.name}, {type_name(dtype)}", name, times[name], **notes)

    def measure_convolutions(self, dtype: torch.dtype) -> None:
        """Convolutions over 3x3x3 alone, in three ways that give the same."""
        for inputs, outputs, frames, height, width in self.case.convolutions():
            shape = (1, 2 + frames, height, width, inputs)
            last = torch.randn(shape, device=self.options.device, dtype=dtype).movedim(-1, 1)
            weight = torch.randn(outputs, inputs, 3, 3, 3, device=self.options.device, dtype=dtype) / inputs
            ways: dict[str, Callable[[], object]] = {
                "conv3d, channels last": partial(conv3d, last, weight, padding=(0, 1, 1)),
                "conv3d, channels first": partial(conv3d, last.contiguous(), weight, padding=(0, 1, 1)),
                "3 conv2d, channels last": partial(frame_by_frame, last, weight),
            }
            work = 2 * 27 * inputs * outputs * frames * height * width
            times = harness.measure(ways, self.options.device, self.options.rounds)
            for name in ways:
                rate = work / (statistics.median(times[name]) * 1e-3) / 1e12
                case = f"convolution {inputs} to {outputs}, {[frames, height, width]}, {type_name(dtype)}"
                self.add(case, name, times[name], tflop_per_s=rate)

    def add(self, case: str, version: str, times: list[float], **notes: float | str) -> None:
        self.rows.append(harness.row(case, version, times, **notes))
        harness.keep("vae", self.rows, self.options, self.skipped)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def frame_by_frame(x: Tensor, weight: Tensor) -> Tensor:
    """The sum over time as three convolutions over 3x3, of all frames at once."""
    frames = x.shape[2] - 2
    parts = [
        conv2d(x[0, :, first : first + frames].transpose(0, 1), weight[:, :, first], padding=1) for first in range(3)
    ]
    return parts[0].add_(parts[1]).add_(parts[2])


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--compile", action="store_true", help="also diffusers under torch.compile")
    parser.add_argument("--no-convolutions", action="store_true", help="leave out single convolutions")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    case = FULL if options.device == "cuda" else SMALL
    bench = Bench(case, options)
    for dtype in (getattr(torch, name) for name in options.dtype or case.dtypes):
        with torch.no_grad():
            bench.measure_vae(dtype)
            if not options.no_convolutions:
                bench.measure_convolutions(dtype)
    harness.show("vae", bench.rows, options, bench.skipped)


if __name__ == "__main__":
    main()
