"""Times and errors of every dense attention that can run here: what `u4d bench attention` measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from u4d_fast.attention_table import Measured, device_name
from u4d_fast.dense_attention import attention_backends, dense_attention

WARM_UP = 2
LEAST_REPEATS = 3
LONGEST_SECONDS = 10.0  # of one backend's forward or backward pass; fewer repeats where they take longer
SAMPLED_ROWS = 32
BACKWARD_PRODUCTS = 2.5  # five products of the size of the forward pass's two
L2_BYTES = 256 * 2**20  # more than any GPU's L2

Progress = Callable[[str, int, int], None]
Spread = tuple[float, float, float]
"""Median, 10th and 90th percentile."""


@dataclass(frozen=True)
class Shape:
    """Self-attention as it is measured: q, k and v are `[batch,tokens,heads,head_dim]`."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim

    def words(self) -> str:
        return f"{self.batch} x {self.tokens} tokens, {self.heads} heads of {self.head_dim}, {self.dtype}"


@dataclass(frozen=True)
class Timed:
    """One backend: medians with the 10th and the 90th percentile, or the reason why there are none.

    Attributes:
        forward_ms, backward_ms: (median, low, high).
        error: relative L2 distance from attention in float64, over a sample of the queries.
        reason: why it was not measured.
    """

    backend: str
    forward_ms: Spread | None = None
    backward_ms: Spread | None = None
    error: float | None = None
    reason: str = ""


def measure_attention(shape: Shape, device: str, repeats: int, progress: Progress) -> list[Timed]:
    """Every backend in turn, each with the same random tensors.

    Args:
        device: "cpu" or "cuda".
        repeats: timed calls of a pass; fewer where they take longer than `LONGEST_SECONDS`.
        progress: called with (backend, backends done, backends in all).
    """
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, generator=generator).to(device, getattr(torch, shape.dtype)) for _ in range(3))
    rows = torch.randperm(shape.tokens, generator=generator)[:SAMPLED_ROWS].to(device)
    expected = exact_rows(q, k, v, rows)
    reasons = attention_backends(q, k, v)
    timed = []
    for number, (backend, reason) in enumerate(reasons.items()):
        progress(backend, number, len(reasons))
        timed.append(Timed(backend, reason=reason) if reason else _measure(backend, (q, k, v), rows, expected, repeats))
    progress("done", len(reasons), len(reasons))
    return timed


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Attention of some queries in float64: `[B,T,heads,d]` and `[R]` -> `[B,R,heads,d]`; one head at a time."""
    heads = []
    for head in range(q.shape[2]):
        queries, keys, values = q[:, rows, head].double(), k[:, :, head].double(), v[:, :, head].double()
        heads.append(torch.softmax(queries @ keys.mT / q.shape[-1] ** 0.5, -1) @ values)
    return torch.stack(heads, 2)


def _measure(backend: str, qkv: tuple[Tensor, ...], rows: Tensor, expected: Tensor, repeats: int) -> Timed:
    try:
        with torch.no_grad():
            found = dense_attention(*qkv, backend=backend)[:, rows].double()
            forward = time_calls(lambda: dense_attention(*qkv, backend=backend), repeats, qkv[0].device)
        leaves = [x.detach().requires_grad_() for x in qkv]
        attended = dense_attention(*leaves, backend=backend)
        grad = torch.ones_like(attended)
        backward = time_calls(
            lambda: torch.autograd.grad(attended, leaves, grad, retain_graph=True), repeats, grad.device
        )
    except Exception as error:  # a library that breaks on this machine is a line of the table, not the end of it
        torch.cuda.empty_cache()  # it may have been too large for the memory
        return Timed(backend, reason=f"it failed: {next(iter(str(error).splitlines()), type(error).__name__)}")
    return Timed(backend, forward, backward, float((found - expected).norm() / expected.norm()))


def time_calls(call: Callable[[], Any], repeats: int, device: torch.device) -> Spread:
    """Milliseconds of a call."""
    times: list[float] = []
    started = 0.0
    for number in range(WARM_UP + repeats):
        if number == WARM_UP:
            started = time.perf_counter()
        elapsed = _gpu_ms(call) if device.type == "cuda" else _cpu_ms(call)
        if number >= WARM_UP:
            times.append(elapsed)
        if len(times) >= LEAST_REPEATS and time.perf_counter() - started > LONGEST_SECONDS:
            break
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return statistics.median(times), deciles[0], deciles[-1]


def _cpu_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _gpu_ms(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda").zero_()  # nothing is in the cache, and Python gets ahead
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def as_measured(shape: Shape, timed: list[Timed], device: str) -> Measured:
    """What `dense_attention(backend="auto")` wants to know of it."""
    done = [(one.backend, one.forward_ms, one.backward_ms) for one in timed]
    return Measured(
        device=device_name(torch.device(device)),
        dtype=shape.dtype,
        head_dim=shape.head_dim,
        tokens=shape.tokens,
        keys=shape.tokens,
        forward_ms={name: forward[0] for name, forward, _ in done if forward},
        training_ms={name: forward[0] + back[0] for name, forward, back in done if forward and back},
        torch=torch.__version__,
    )


def as_json(shape: Shape, timed: list[Timed], device: str, peak: float | None) -> dict[str, Any]:
    """Everything that was measured, for other programs."""
    return {
        "device": device_name(torch.device(device)),
        "torch": torch.__version__,
        "shape": asdict(shape),
        "forward_flops": shape.flops,
        "backward_flops": BACKWARD_PRODUCTS * shape.flops,
        "peak_flops": peak,
        "backends": [asdict(one) for one in timed],
    }
