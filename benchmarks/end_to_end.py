"""One completion from end to end, stage by stage, and the search over candidates: full size, random weights.

    python benchmarks/end_to_end.py [--preset wan-1.3b|tiny|debug] [--minutes 2.5] [--steps 40] [--candidates 16]
                                    [--text-tokens 64] [--no-compile] [--device cpu|cuda] [--threads N] [--save]

Weights are made on the device; the text encoder is left out (a prompt's embeddings are random). The same weights run as
plain PyTorch (reference ops, torch's own attention), the same compiled block by block, and as u4d, launched eagerly and
as a captured graph; they must agree before anything is timed. What does not fit into --minutes is worked out from fewer
timed steps, and its row says so ("extrapolated"); what is left out is named. Images are taken as observed (`rgb:all`),
yet their decoding is measured and counted, as if they were not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import harness
import torch
from random_system import System, random_system
from torch import Tensor

import u4d_fast
from u4d import presets
from u4d.diffusion.unipc import unipc_start, unipc_table
from u4d.model.latents import decode_latents, encode_streams
from u4d.model.streams import to_clips
from u4d.sample.candidates import AT_ONCE, Sampling, draw_candidates
from u4d.sample.captured import Denoiser
from u4d.sample.halving import plan_cuts
from u4d.sample.search import CandidateScores, draw_candidate_noise, score_candidates
from u4d.sample.step import Velocity, conditions

TOLERANCE = 5e-2  # of the largest velocity: bfloat16, other kernels
GUIDANCE = 2.0
OURS = "u4d kernels, captured"  # the report compares with the first version of a case that has "kernel" in its name
EAGER = "u4d kernels, eager launches"
COMPILED = "torch.compile, blocks"
PLAIN = "torch eager + SDPA"


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


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Of one call, the device's work included."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def repeated(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Milliseconds of some calls, after one that does not count."""
    call()
    return [1e3 * seconds_of(call, device) for _ in range(rounds)]


@contextmanager
def peak_memory(device: str, notes: dict[str, float | str]) -> Iterator[None]:
    """Writes the block's peak into the notes; on a CPU nothing."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    if device == "cuda":
        notes["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        notes["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9


# --- versions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """How the same weights run."""

    name: str
    capture: bool
    backend: str = "auto"
    compiled: bool = False

    @contextmanager
    def active(self, system: System) -> Iterator[Velocity]:
        """The model, run so."""
        model = system.model
        with u4d_fast.use_backend(self.backend), torch.no_grad():  # type: ignore[arg-type]
            for block in model.blocks:
                if self.compiled:
                    block.compile()
            keys = model.text_keys(system.text)
            try:
                yield lambda latents, times: model(latents.to(model.dtype), times, keys)
            finally:
                for block in model.blocks:
                    block._compiled_call_impl = None


def versions_for(device: str, compiled: bool) -> list[Version]:
    """The first is what the others are compared with."""
    ours = [Version(OURS, True)] if device == "cuda" else []
    others = [Version(EAGER, False), Version(PLAIN, False, "reference")]
    return ours + others + ([Version(COMPILED, False, "reference", True)] if compiled else [])


class Steps:
    """Times steps of a version with so many candidates at once."""

    def __init__(self, system: System, version: Version, velocity: Velocity, steps: int, clips: int) -> None:
        self.system, self.table = system, unipc_table(steps)
        self.noise = draw_candidate_noise(0, clips, system.clean.shape[1:], device=system.device)
        clean, observed = system.clean.expand(self.noise.shape), system.observed.expand(clips, *system.observed.shape)
        given = conditions(velocity, clean, observed, self.table, like=self.noise, guidance=GUIDANCE)
        self.denoiser = Denoiser(given, self.noise, capture=version.capture)

    def run(self, steps: int) -> Tensor:
        """The first steps of a trajectory."""
        start = unipc_start(self.noise, self.table)
        self.denoiser.run(self.noise, start, 0, steps)
        return self.denoiser.state.clean[0].clone()

    def timed(self, rounds: int) -> list[float]:
        """Milliseconds of single steps; a first run warms up, records, and does not count."""
        self.run(min(3, self.table.steps))
        return [1e3 * seconds_of(lambda: self.run(1), self.system.device) for _ in range(rounds)]


# --- the measurements ------------------------------------------------------------------------------------------------


class EndToEnd:
    """Runs all cases and collects rows."""

    def __init__(self, system: System, options: argparse.Namespace) -> None:
        self.system, self.options, self.rows = system, options, list[harness.Row]()
        self.budget = Budget(options.seconds or 60 * options.minutes)
        self.skipped: dict[str, str] = {}
        self.stages: dict[str, float] = {}  # milliseconds for one clip
        self.steps: dict[tuple[str, int], float] = {}  # milliseconds of a step, by version and clips

    def add(self, case: str, version: str, times: list[float], **notes: float | str) -> None:
        row = harness.row(case, version, times, **notes)
        self.rows.append(row)
        print(f"  {case}: {version}: {row.ms:.1f} ms", flush=True)
        if self.options.save:  # a run that is stopped leaves what it has
            harness.save("end_to_end", self.rows, self.options.device, self.options.threads, self.skipped)

    @torch.no_grad()
    def measure_stages(self) -> None:
        """All but denoising."""
        system, rounds = self.system, self.options.rounds
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
            notes: dict[str, float | str] = {}
            with peak_memory(system.device, notes):
                times = repeated(call, system.device, rounds)
            self.stages[case] = statistics.median(times)
            self.add(case, "u4d", times, **notes)

    def check_agreement(self, versions: list[Version]) -> list[Version]:
        """Refuse to time versions whose first answers differ. Returns those that there was time to make ready."""
        answers: dict[str, Tensor] = {}
        for version in versions:
            if version.compiled and not self.budget.allows(self.options.compile_seconds):
                self.skipped[version.name] = f"{self.budget.left():.0f} s were left, too few to compile in"
                continue
            with version.active(self.system) as velocity:
                began = time.perf_counter()
                answers[version.name] = Steps(self.system, replace(version, capture=False), velocity, 4, 1).run(1)
                print(f"  {version.name}: ready after {time.perf_counter() - began:.1f} s", flush=True)
        for name, answer in answers.items():
            harness.check_close((answers[PLAIN],), (answer,), TOLERANCE, name)
        return [version for version in versions if version.name in answers]

    def measure_steps(self, version: Version, clips: int) -> None:
        """One denoising step: both branches of guidance in one batch."""
        notes: dict[str, float | str] = {}
        with version.active(self.system) as velocity, peak_memory(self.system.device, notes):
            steps = Steps(self.system, version, velocity, self.options.steps, clips)
            times = steps.timed(self.options.rounds)
            notes["launched"] = str(steps.denoiser.launching)
        self.steps[version.name, clips] = statistics.median(times)
        work = 2 * clips * sum(forward_flops(self.system)) / 1e12
        notes["tflop_per_s"] = work / (statistics.median(times) * 1e-3)
        self.add(f"step, {clips} clip{'s' if clips > 1 else ''} x 2 branches", version.name, times, **notes)

    def measure_clip(self, version: Version) -> None:
        """All steps of one clip, then the other stages on top."""
        step = self.steps[version.name, 1]
        denoised = self.whole(version, 1, (), step * self.options.steps)
        others = sum(self.stages[name] for name in ("encode rgb and depth", "decode rgb and depth", "cameras", "score"))
        notes = {"denoise_ms": denoised.ms, "other_stages_ms": others, **denoised.notes}
        self.add(f"one clip, {self.options.steps} steps, all stages", version.name, [denoised.ms + others], **notes)

    def measure_search(self, version: Version, halving: bool) -> None:
        """L candidates, decoded and scored."""
        count = self.options.candidates
        cuts = plan_cuts(count, self.options.steps, halving)
        per_candidate = self.stages["decode rgb and depth"] + self.stages["cameras"] + self.stages["score"]
        counts, ends = [count, *(cut.keep for cut in cuts)], [*(cut.after for cut in cuts), self.options.steps]
        estimate, begin = 0.0, 0
        for alive, stop in zip(counts, ends, strict=True):
            batches = [min(AT_ONCE, alive - first) for first in range(0, alive, AT_ONCE)]
            estimate += (stop - begin) * sum(self.a_step(version, clips) for clips in batches)
            begin = stop
        ranked = sum(counts[:-1]) if cuts else 0
        found = self.whole(version, count, cuts, estimate + ranked * per_candidate)
        decoded = self.stages["encode rgb and depth"] + counts[-1] * per_candidate
        case = f"{count} candidates, {' -> '.join(map(str, counts)) if cuts else 'every forward'}"
        self.add(case, version.name, [found.ms + decoded], denoise_ms=found.ms, other_stages_ms=decoded, **found.notes)

    def a_step(self, version: Version, clips: int) -> float:
        """Milliseconds of a step; where it was not measured, the nearest number of clips in proportion."""
        measured = {size: ms for (name, size), ms in self.steps.items() if name == version.name}
        nearest = min(measured, key=lambda size: abs(size - clips))
        return measured[nearest] * clips / nearest

    def whole(self, version: Version, count: int, cuts: tuple, estimate: float) -> Whole:  # type: ignore[type-arg]
        """Really drawn where the time allows, else the estimate, which says that it is one."""
        if not self.budget.allows(1e-3 * estimate):
            return Whole(estimate, {"steps": "extrapolated from single steps"})
        system, table = self.system, unipc_table(self.options.steps)
        sampling = Sampling(system.clean, system.observed, table, GUIDANCE, seed=0, capture=version.capture)
        notes: dict[str, float | str] = {}
        with version.active(system) as velocity, peak_memory(system.device, notes):
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
    bench.measure_stages()
    versions = bench.check_agreement(versions_for(options.device, options.compile))
    for version in versions:
        bench.measure_steps(version, 1)
    ours = versions[0]
    bench.measure_clip(ours)
    bench.measure_steps(ours, min(AT_ONCE, options.candidates))
    bench.measure_search(ours, halving=True)
    for version in versions[1:]:
        bench.measure_clip(version)
    bench.measure_search(ours, halving=False)
    height, width = system.preset.transformer.image_size
    print(f"{name}: {system.frames} frames of {height}x{width}, {options.steps} steps, guidance {GUIDANCE:g}")
    harness.show("end_to_end", bench.rows, options, bench.skipped)


if __name__ == "__main__":
    main()
