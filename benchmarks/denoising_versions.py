"""How the same weights run: with our kernels or in plain PyTorch, launched, captured or compiled, exact or in fp8."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from random_system import System
from torch import Tensor

import u4d_fast
from u4d.diffusion.unipc import unipc_start, unipc_table
from u4d.presets import Precision
from u4d.sample.captured import Denoiser
from u4d.sample.search import draw_candidate_noise
from u4d.sample.step import Velocity, conditions
from u4d_fast.backend import Backend

GUIDANCE = 2.0
OURS = "u4d kernels, captured"  # the report compares with the first version of a case that has "kernel" in its name
FP8 = "u4d kernels, fp8"
EAGER = "u4d kernels, eager launches"
COMPILED = "torch.compile, blocks"
PLAIN = "torch eager + SDPA"


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


@dataclass(frozen=True)
class Version:
    """How the same weights run.

    Attributes:
        capture: as a recorded graph; None: where that is possible.
        precision: of `u4d_fast.accelerate`.
    """

    name: str
    capture: bool | None = False
    backend: Backend = "auto"
    compiled: bool = False
    precision: Precision = "exact"

    @contextmanager
    def active(self, system: System) -> Iterator[Velocity]:
        """The model, run so."""
        model = system.model
        with u4d_fast.use_backend(self.backend), torch.no_grad():
            try:
                if self.precision != "exact":
                    u4d_fast.accelerate(model, precision=self.precision)
                if self.compiled:
                    for block in model.blocks:
                        block.compile()
                keys = model.text_keys(system.text)
                yield lambda latents, times: model(latents.to(model.dtype), times, keys)
            finally:
                u4d_fast.restore(model)
                for block in model.blocks:
                    block._compiled_call_impl = None


PLAINLY = Version(PLAIN, backend="reference")


def versions_for(device: str, compiled: bool) -> list[Version]:
    """In the order in which they are timed: what time may be too short for comes last."""
    ours = [Version(OURS, True)] if device == "cuda" else []
    fp8 = [Version(FP8, None, precision="fp8"), Version(f"{FP8} linear layers", None, precision="fp8-linear")]
    last = [Version(COMPILED, backend="reference", compiled=True)] if compiled else []
    return [*ours, Version(EAGER), PLAINLY, *fp8, *last]


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
