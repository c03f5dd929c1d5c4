"""The denoising loop over buffers that stay where they are: on a GPU one recorded graph is replayed for every step.

A step launches some thousand small kernels, which takes the host longer than the GPU where clips are short. A CUDA
graph launches them as one. It repeats what was recorded, addresses included, so a step reads and writes fixed buffers
and takes its number from a counter on the device. The first step of a run is an ordinary one: it is part of the result,
and warms up what must not happen first while recording (workspaces, plans). The second is recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from u4d.diffusion.unipc import UniPCState
from u4d.sample.step import Conditions, denoising_step

LEAST_STEPS = 3  # with two, recording costs what it saves

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Launching:
    """How steps were launched.

    Attributes:
        captured: as a recorded graph.
        reason: why not; empty where they were.
    """

    captured: bool
    reason: str = ""

    def __str__(self) -> str:
        return "captured graph" if self.captured else f"eager: {self.reason}"


class CaptureError(RuntimeError):
    """Capture was asked for and can't be had."""


def prevents_capture(model: nn.Module) -> str:
    """Why a model's forward can't be replayed from a recording; empty where nothing is known against it."""
    if any(hasattr(part, "_hf_hook") for part in model.modules()):
        return "accelerate's hooks move its weights"
    if any(weight.device.type != "cuda" for weight in model.parameters()):
        return "its weights are not on a GPU"
    return ""


class Denoiser:
    """Takes batches of clips through steps; every batch of the same shape uses the same buffers and the same graph.

    Attributes:
        launching: how the steps of the last run were launched; None before the first.
        counter: [1] int64, the step that comes next.
        noise: the batch's noise.
        state: the sampler's state, written in place.
    """

    def __init__(self, given: Conditions, like: Tensor, *, capture: bool | None = None, prevented: str = "") -> None:
        """Buffers for batches like that noise.

        Args:
            given: what stays the same over steps and batches.
            like: [B,4,16,F,h,w].
            capture: None: where it pays and nothing prevents it. True: or raise. False: never.
            prevented: why capture is out of the question, if it is; see `prevents_capture`.
        Raises:
            CaptureError: capture was asked for, and there is no GPU, or something prevents it.
        """
        self.given, self.capture = given, capture
        self.counter = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.noise = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self.state = UniPCState(
            sample=torch.zeros_like(self.noise),
            last=torch.zeros_like(self.noise),
            clean=tuple(torch.zeros_like(self.noise) for _ in range(given.order)),
        )
        self.launching: Launching | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.prevented = "it runs on the CPU" if like.device.type != "cuda" else prevented
        if capture and self.prevented:
            raise CaptureError(f"capture: expected nothing against it, got: {self.prevented}")

    def run(self, noise: Tensor, state: UniPCState, first: int, stop: int, progress: Progress | None = None) -> None:
        """Take steps first .. stop - 1; `self.state` is then what it is after them, until the next run.

        Args:
            noise: like the buffers.
            state: before step `first`.
            first, stop: steps.
            progress: called with every step's number when it is done. A GPU is not held up for it: the next step is
                queued before the last one is waited for.
        Raises:
            CaptureError: capture was asked for and failed.
        """
        self.load(noise, state, first)
        del state  # it is in the buffers
        reason = self.reason_not_to(stop - first)
        self.launching = Launching(not reason, reason)
        pace = Pace(progress, self.noise.device)
        with side_stream(self.noise.device):
            for step in range(first, stop):
                warm = step > first or self.graph is not None
                if self.launching.captured and warm:
                    self.replay()
                else:
                    self.advance()
                pace.told(step)
            pace.finish()
            if self.graph is not None:
                wait_for(self.noise.device)  # a graph must not be freed while it runs

    def reason_not_to(self, steps: int) -> str:
        """Why these steps are not captured; empty where they are."""
        if self.capture is False:
            return "switched off"
        if self.prevented:
            return self.prevented
        least = 2 if self.capture else LEAST_STEPS
        if steps < least and self.graph is None:
            return f"fewer than {least} steps"
        return ""

    def load(self, noise: Tensor, state: UniPCState, step: int) -> None:
        """Put a batch into the buffers."""
        self.noise.copy_(noise)
        self.write(state)
        self.counter.fill_(step)

    def advance(self) -> None:
        """One step, in place: what is recorded, and what runs where nothing is."""
        self.write(denoising_step(self.given, self.counter, self.noise, self.state))
        self.counter.add_(1)

    def write(self, state: UniPCState) -> None:
        """Copy a state into the buffers; it may share the history with them, so the oldest prediction goes first."""
        for buffer, value in zip(reversed(self.state.clean), reversed(state.clean), strict=True):
            buffer.copy_(value)
        self.state.last.copy_(state.last)
        self.state.sample.copy_(state.sample)

    def replay(self) -> None:
        """One step by the graph, which is recorded if there is none; if that fails, one ordinary step.

        A recording that fails has done nothing to the buffers, so the run goes on where it was.
        """
        if self.graph is None:
            try:
                self.graph = record(self.advance)
            except RuntimeError as error:
                told = first_line(error)
                if self.capture:
                    raise CaptureError(f"capture: recording the step failed: {told}") from error
                self.prevented = f"recording failed: {told}"
                self.launching = Launching(False, self.prevented)
                self.advance()
                return
        self.graph.replay()


def copied(state: UniPCState) -> UniPCState:
    """A state that no later step changes."""
    return UniPCState(state.sample.clone(), state.last.clone(), tuple(part.clone() for part in state.clean))


def record(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of that work, recorded on the current stream, which must not be the default one. It runs nothing."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    # The outer context puts the stream back also where the inner one fails on its way out.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


def first_line(error: BaseException) -> str:
    """What went wrong first: leaving a failed recording raises once more."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return str(error).strip().partition("\n")[0]


@cache
def recording_stream(device: int) -> torch.cuda.Stream:
    """The one on which steps run: each stream that cuBLAS sees keeps a workspace of its own."""
    return torch.cuda.Stream(device)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU: work on a stream that can be recorded, after what is queued and before what comes."""
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    outer, inner = torch.cuda.current_stream(index), recording_stream(index)
    inner.wait_stream(outer)
    try:
        with torch.cuda.stream(inner):
            yield
    finally:
        outer.wait_stream(inner)


def wait_for(device: torch.device) -> None:
    """Until the current stream is done."""
    torch.cuda.current_stream(device).synchronize()


class Pace:
    """Tells of steps that are done. On a GPU it waits for a step only when the next one is queued."""

    def __init__(self, progress: Progress | None, device: torch.device) -> None:
        self.progress, self.on_gpu = progress, device.type == "cuda"
        self.queued: list[tuple[int, torch.cuda.Event | None]] = []

    def told(self, step: int) -> None:
        """A step was launched on the current stream."""
        if self.progress is None:
            return
        event = None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.queued.append((step, event))
        self.tell(keep=0 if event is None else 1)

    def finish(self) -> None:
        """Tell of all that are left."""
        self.tell(keep=0)

    def tell(self, keep: int) -> None:
        while len(self.queued) > keep and self.progress is not None:
            step, event = self.queued.pop(0)
            if event is not None:
                event.synchronize()
            self.progress(step)
