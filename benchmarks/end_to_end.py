"""One completion from end to end, stage by stage, and the search over candidates: full size, random weights.

    python benchmarks/end_to_end.py [--preset wan-1.3b|tiny|debug] [--minutes 2.5] [--steps 40] [--candidates 16]
                                    [--text-tokens 64] [--no-compile] [--device cpu|cuda] [--threads N] [--save]

Weights are made on the device; the text encoder is left out (a prompt's embeddings are random). The same weights run as
plain PyTorch (reference ops, torch's own attention), the same compiled block by block, and as u4d, launched eagerly, as
a captured graph, and in fp8. `error` is how far one forward is from plain PyTorch's (relative L2); a version that is
too far off is not timed. What does not fit into --minutes is worked out from fewer timed steps, and its row says so
("extrapolated"); what is left out is named. Images are taken as observed (`rgb:all`), yet their decoding is measured
and counted, as if they were not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import harness
import torch
from denoising_versions import GUIDANCE, PLAINLY, Steps, Version, seconds_of, versions_for, wait
from random_system import System, random_system
from torch import Tensor

from u4d import presets
from u4d.diffusion.unipc import unipc_table
from u4d.model.latents import decode_latents, encode_streams
from u4d.model.streams import to_clips
from u4d.sample.candidates import AT_ONCE, Sampling, draw_candidates
from u4d.sample.halving import Cut, plan_cuts
from u4d.sample.search import CandidateScores, score_candidates
from u4d.sample.step import Velocity

TOLERANCE = 5e-2  # relative L2 distance of velocities: bfloat16, other kernels
FP8_TOLERANCE = 0.5  # what fp8 loses is to be seen in the rows; this only refuses what is plainly wrong
STAGE_SECONDS = 4.0  # of each stage; fewer rounds where they take longer
OF_A_CANDIDATE = ("decode rgb and depth", "cameras", "score")  # what its latents go through


@dataclass
class Budget:
    """Seconds that are left."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def allows(self, seconds: float) -> bool:
        """Whether that fits, with a tenth to spare."""
        return 1.1 * seconds < self.left()


# --- time ------------------------------------------------------------------------------------------------------------


def repeated(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Milliseconds of some calls, after one that does not count."""
    call()
    end, times = time.perf_counter() + STAGE_SECONDS, list[float]()
    while len(times) < rounds and (not times or time.perf_counter() < end):
        times.append(1e3 * seconds_of(call, device))
    return times


# --- the measurements ------------------------------------------------------------------------------------------------


class EndToEnd:
    """Runs all cases and collects rows."""

    def __init__(self, system: System, options: argparse.Namespace) -> None:
        self.system, self.options, self.rows = system, options, list[harness.Row]()
        self.budget = Budget(options.seconds or 60 * options.minutes)
        self.skipped: dict[str, str] = {}
        self.stages: dict[str, float] = {}  # milliseconds for one clip
        self.steps: dict[tuple[str, int], float] = {}  # milliseconds of a step, by version and clips
        self.errors: dict[str, float] = {}  # of one forward, by version

    def add(self, case: str, version: str, times: list[float], **notes: float | str) -> None:
        row = harness.row(case, version, times, **notes)
        self.rows.append(row)
        print(f"  {case}: {version}: {row.ms:.1f} ms", flush=True)
        harness.keep("end_to_end", self.rows, self.options, self.skipped)

    @torch.no_grad()
    def measure_stages(self) -> None:
        """All but denoising."""
        system = self.system
        codec, streams, frames = system.codec, system.streams, system.frames
        rgb, depth = system.clean[:, 0], system.clean[:, 1]
        assert streams.rgb is not None
        scale = torch.ones(1, device=system.device)
        decoded = decode_latents(system.clean, codec, system.statistics, frames)
        clips, _ = to_clips(decoded, frames, scale)
        calls: dict[str, Callable[[], object]] = {
            "encode rgb": lambda: codec.encode(streams.rgb, "rgb"),
            "encode rgb and depth": lambda: encode_streams(streams, codec, system.statistics),
            "decode depth": lambda: codec.decode(depth, "depth", frames),
            "decode rgb and depth": lambda: (codec.decode(rgb, "rgb", frames), codec.decode(depth, "depth", frames)),
            "cameras": lambda: to_clips(decoded, frames, scale),
            "score": lambda: score_candidates(*clips.everything()),
        }
        for case, call in calls.items():
            self.works(case, partial(self.measure_stage, case, call))

    def measure_stage(self, case: str, call: Callable[[], object]) -> None:
        """One of them, for one clip."""
        notes: dict[str, float | str] = {}
        with harness.peak_memory(self.system.device, notes):
            times = repeated(call, self.system.device, self.options.rounds)
        self.stages[case] = statistics.median(times)
        self.add(case, "u4d", times, **notes)

    def stages_ms(self, *cases: str) -> float:
        """Of stages together.

        Raises:
            ValueError: one of them was not measured.
        """
        for case in cases:
            if case not in self.stages:
                raise ValueError(f"the stage '{case}' was not measured")
        return sum(self.stages[case] for case in cases)

    def measure_versions(self, versions: list[Version]) -> list[Version]:
        """A step of each. Returns the versions that can be trusted; of the others it is told why they can't."""
        with PLAINLY.active(self.system) as velocity:
            expected = self.one_forward(velocity)
        trusted = []
        for version in versions:
            if version.compiled and not self.budget.allows(self.options.compile_seconds):
                self.skipped[version.name] = f"{self.budget.left():.0f} s were left, too few to compile in"
                continue
            if self.works(version.name, partial(self.measure_version, version, expected)):
                trusted.append(version)
        return trusted

    def measure_version(self, version: Version, expected: Tensor) -> None:
        """Its error, then its step."""
        self.errors[version.name] = self.checked_error(version, expected)
        self.measure_steps(version, 1)

    def works(self, name: str, measure: Callable[[], None]) -> bool:
        """Whether a measurement came to its end: what one version can't do must not cost the others their times."""
        try:
            measure()
        except Exception as error:
            self.skipped[name] = harness.reason_of(error)
            print(f"  {name}: left out: {self.skipped[name]}", flush=True)
            return False
        return True

    def one_forward(self, velocity: Velocity) -> Tensor:
        """The velocity at t = 0.5, twice in one batch: the shape of a step, for which compiled versions are made."""
        system = self.system
        times = torch.full((2, *system.observed.shape), 0.5, device=system.device)
        return velocity(system.clean.expand(2, *system.clean.shape[1:]), times).double()

    def checked_error(self, version: Version, expected: Tensor) -> float:
        """The relative L2 distance of a version's forward from plain PyTorch's.

        Raises:
            ValueError: it is too large, or not a number.
        """
        began = time.perf_counter()
        with version.active(self.system) as velocity:
            found = self.one_forward(velocity)
        error = float((found - expected).norm() / expected.norm())
        print(f"  {version.name}: ready after {time.perf_counter() - began:.1f} s, off by {error:.2g}", flush=True)
        if not error <= (TOLERANCE if version.precision == "exact" else FP8_TOLERANCE):
            raise ValueError(f"one forward is off by {error:.2g}")
        return error

    def measure_steps(self, version: Version, clips: int) -> None:
        """One denoising step: both branches of guidance in one batch."""
        notes: dict[str, float | str] = {"error": self.errors[version.name]}
        with version.active(self.system) as velocity, harness.peak_memory(self.system.device, notes):
            steps = Steps(self.system, version, velocity, self.options.steps, clips)
            times = steps.timed(self.options.rounds)
            notes["launched"] = str(steps.denoiser.launching)
        self.steps[version.name, clips] = statistics.median(times)
        work = 2 * clips * sum(forward_flops(self.system)) / 1e12
        notes["tflop_per_s"] = work / (statistics.median(times) * 1e-3)
        self.add(f"step, {clips} clip{'s' if clips > 1 else ''} x 2 branches", version.name, times, **notes)

    def measure_clip(self, version: Version) -> None:
        """All steps of one clip, then the other stages on top."""
        others = self.stages_ms("encode rgb and depth", *OF_A_CANDIDATE)
        denoised = self.whole(version, 1, (), self.steps[version.name, 1] * self.options.steps)
        notes = {"error": self.errors[version.name], "denoise_ms": denoised.ms, "other_stages_ms": others}
        case = f"one clip, {self.options.steps} steps, all stages"
        self.add(case, version.name, [denoised.ms + others], **notes, **denoised.notes)

    def measure_search(self, version: Version, halving: bool) -> None:
        """L candidates, decoded and scored."""
        count = self.options.candidates
        at_once = min(AT_ONCE, count)
        if (version.name, at_once) not in self.steps:
            self.measure_steps(version, at_once)
        cuts = plan_cuts(count, self.options.steps, halving)
        per_candidate = self.stages_ms(*OF_A_CANDIDATE)
        counts, ends = [count, *(cut.keep for cut in cuts)], [*(cut.after for cut in cuts), self.options.steps]
        estimate, begin = 0.0, 0
        for alive, stop in zip(counts, ends, strict=True):
            batches = [min(AT_ONCE, alive - first) for first in range(0, alive, AT_ONCE)]
            estimate += (stop - begin) * sum(self.a_step(version, clips) for clips in batches)
            begin = stop
        ranked = sum(counts[:-1]) if cuts else 0
        found = self.whole(version, count, cuts, estimate + ranked * per_candidate)
        decoded = self.stages_ms("encode rgb and depth") + counts[-1] * per_candidate
        case = f"{count} candidates, {' -> '.join(map(str, counts)) if cuts else 'every forward'}"
        self.add(case, version.name, [found.ms + decoded], denoise_ms=found.ms, other_stages_ms=decoded, **found.notes)

    def a_step(self, version: Version, clips: int) -> float:
        """Milliseconds of a step; where it was not measured, the nearest number of clips in proportion."""
        measured = {size: ms for (name, size), ms in self.steps.items() if name == version.name}
        nearest = min(measured, key=lambda size: abs(size - clips))
        return measured[nearest] * clips / nearest

    def whole(self, version: Version, count: int, cuts: tuple[Cut, ...], estimate: float) -> Whole:
        """Really drawn where the time allows, else the estimate, which says that it is one."""
        if not self.budget.allows(1e-3 * estimate):
            return Whole(estimate, {"steps": "extrapolated from single steps"})
        system, table = self.system, unipc_table(self.options.steps)
        sampling = Sampling(system.clean, system.observed, table, GUIDANCE, seed=0, capture=version.capture)
        notes: dict[str, float | str] = {}
        with version.active(system) as velocity, harness.peak_memory(system.device, notes):
            began = time.perf_counter()
            drawn = draw_candidates(sampling, lambda: just(velocity), count, cuts=cuts, score=self.score)
            wait(system.device)
            elapsed = 1e3 * (time.perf_counter() - began)
        return Whole(elapsed, {"steps": "all run", "launched": drawn.launching, **notes})

    def score(self, latents: Tensor) -> CandidateScores:
        """Decode, fit cameras, warp: one by one, as the pipeline does."""
        system, parts = self.system, []
        for one in latents.split(1):
            decoded = decode_latents(one, system.codec, system.statistics, system.frames)
            clips, _ = to_clips(decoded, system.frames, torch.ones(1, device=system.device))
            parts.append(score_candidates(*clips.everything()))
        return CandidateScores(
            torch.cat([part.error for part in parts]),
            torch.cat([part.pair_error for part in parts]),
            torch.cat([part.overlap for part in parts]),
            parts[0].pairs,
        )


@dataclass(frozen=True)
class Whole:
    """Milliseconds of all steps, and whether they were all run."""

    ms: float
    notes: dict[str, float | str]


@contextmanager
def just(velocity: Velocity) -> Iterator[Velocity]:
    yield velocity


def forward_flops(system: System) -> tuple[float, float]:
    from u4d.train.cost.flops import forward_flops

    return forward_flops(system.preset.transformer, system.frames)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=5)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS))
    parser.add_argument("--minutes", type=float, default=2.5, help="what does not fit is extrapolated, and says so")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--text-tokens", type=int, default=64, help="of the prompt; 0 for the null text")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--compile-seconds", type=float, default=60, help="compiled only if so much time is left")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    name = options.preset or ("wan-1.3b" if options.device == "cuda" else "debug")
    system = random_system(presets.PRESETS[name](), options.device, options.text_tokens)
    bench = EndToEnd(system, options)
    bench.works("stages", bench.measure_stages)
    versions = bench.measure_versions(versions_for(options.device, options.compile))
    # Ours in each precision first, then what it is compared with, then what takes minutes.
    ours = versions[:1] + [version for version in versions if version.precision == "fp8"]
    others = [version for version in versions if version not in ours]
    for what, measure in (
        *((f"clip, {one.name}", partial(bench.measure_clip, one)) for one in ours),
        *((f"halving, {one.name}", partial(bench.measure_search, one, halving=True)) for one in ours),
        *((f"clip, {one.name}", partial(bench.measure_clip, one)) for one in others),
        *((f"every forward, {one.name}", partial(bench.measure_search, one, halving=False)) for one in ours),
    ):
        bench.works(what, measure)
    height, width = system.preset.transformer.image_size
    print(f"{name}: {system.frames} frames of {height}x{width}, {options.steps} steps, guidance {GUIDANCE:g}")
    harness.show("end_to_end", bench.rows, options, bench.skipped)


if __name__ == "__main__":
    main()
