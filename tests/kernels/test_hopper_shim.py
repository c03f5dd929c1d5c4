"""The emulation of Hopper's instructions must run right kernels and show every mistake in a wrong one.

hopper_products.cu multiplies matrices in every way that hopper.h offers, with one mistake of choice.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from machine_code import gpu_library
from shim_compiler import KERNELS, cached_library
from torch import Tensor

SOURCE = Path(__file__).with_name("hopper_products.cu")
MISTAKES = re.search(r"enum Mistake \{(.*?)\}", SOURCE.read_text(), re.DOTALL)[1].replace(",", " ").split()  # type: ignore[index]
SHARED, REGISTERS = 0, 1  # where a comes from; b is K-major with the first, MN-major with the second
WIDTHS = (160, 128)  # columns of b
SPANS = [128, 64, 32, 0]  # bytes within which 16-byte pieces are permuted


@dataclass(frozen=True)
class Outcome:
    """What a run gave: status 0 or a failure that the emulation tells, and the largest error of the result."""

    status: int
    failure: str
    error: float


def multiply(
    way: int,
    span: int,
    mistake: str = "kNone",
    depth: int = 256,
    columns: int | None = None,
    order: int = 0,
    seed: int = 1,
) -> Outcome:
    """d = a b with random bfloat16 matrices; `columns` of b exist, those beyond are outside its tensor map."""
    library = cached_library("hopper_products", [SOURCE])
    library.u4d_shim_failure.restype = ctypes.c_char_p
    library.u4d_shim_last_thread_first(order)
    library.u4d_shim_seed(seed)
    a, b = factors(way, depth, columns)
    status, d = product_by(library, way, span, a, b, mistake)
    return Outcome(status, library.u4d_shim_failure().decode(), largest_error(d, a, b))


def factors(way: int, depth: int, columns: int | None) -> tuple[Tensor, Tensor]:
    """Random a `[64,depth]` and b `[depth,columns]`, bfloat16."""
    columns = columns or WIDTHS[way]
    generator = torch.Generator().manual_seed(depth + columns)
    return tuple(torch.randn(shape, generator=generator).bfloat16() for shape in ((64, depth), (depth, columns)))


def product_by(
    library: ctypes.CDLL, way: int, span: int, a: Tensor, b: Tensor, mistake: str = "kNone"
) -> tuple[int, Tensor]:
    """The kernel's status, and d on the CPU, NaN where nothing was written."""
    stored = b.contiguous() if way == REGISTERS else b.T.contiguous()
    d = torch.full((64, WIDTHS[way]), torch.nan, device=a.device)
    sizes = (ctypes.c_int64(x) for x in (a.shape[1], b.shape[1], way, span, MISTAKES.index(mistake)))
    status = library.hopper_products(None, *(ctypes.c_void_p(x.data_ptr()) for x in (a, stored, d)), *sizes)
    return status, d.cpu()


def largest_error(d: Tensor, a: Tensor, b: Tensor) -> float:
    exact = torch.zeros(d.shape, dtype=torch.float64)
    exact[:, : b.shape[1]] = a.double() @ b.double()
    return (d.double() - exact).abs().amax().item()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_a_right_kernel_gives_the_product(way: int, span: int, order: int) -> None:
    for seed in (1, 2, 3):
        outcome = multiply(way, span, order=order, seed=seed)
        assert outcome.status == 0 and outcome.error < 1e-4, outcome


@pytest.mark.parametrize("span", [128, 64, 32])
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_outside_of_a_tensor_is_zero(way: int, span: int) -> None:
    outcome = multiply(way, span, depth=136, columns=88)  # no multiples of a tile
    assert outcome.status == 0 and outcome.error < 1e-4, outcome


SEEN_IN_THE_RESULT = ["kWrongSwizzle", "kWrongStride", "kStageGivenBackEarly"]
TOLD = {
    "kNoProductWait": "the block ended with products under way",
    "kWrongParity": "more than its 1 arrivals while its phase 0 waits",
    "kNoTileWait": "more than its 1 arrivals while its phase 0 waits",
    "kNoStageWait": "more than its 1 arrivals while its phase 0 waits",
    "kTooFewBytes": "got 16 bytes more than were expected",
    "kTooManyBytes": r"threads 0 to 127 wait for parity 0 of the barrier at .* \(phase 0, 0 of 1 arrivals and 16 bytes",
    "kNoProductFence": "a product without wgmma_fence",
    "kAccumulatorWritten": "an accumulator was written while a product on it was under way",
    "kThreeWarps": "threads 0 to 95 wait for products that other threads of warpgroup 0 have not issued",
    "kArrivalForgotten": r"threads 128 to 128 wait for parity 0 of .* \(phase 0, 1 of 128 arrivals and 0 bytes",
    "kArrivalTooMany": "deadlock",
    "kNoInitFence": "a copy without fence_barrier_init",
    "kUnaligned": "a copy's destination 64 is not aligned to 1024 bytes",
    "kRegistersOfOneWarp": "setmaxnreg was not executed alike by all warps of warpgroup 1",
    "kTooManyRegisters": "setmaxnreg: 73728 registers wanted, 64512 there",
    "kStageWritten": "shared memory from byte .* was written while a copy into it was under way",
    "kNamedBarrierForgotten": r"threads 0 to 63 wait at named barrier 1 \(64 of 128 threads have come\)",
    "kNamedBarrierCount": "named barrier 1",
    "kCopyNotWaitedFor": "the block ended with . copies under way",
    "kBarrierOverwritten": "the barrier at .* was overwritten",
    "kSharedMemoryNotAllowed": "bytes of shared memory, but the kernel was allowed 1024",
}
ONE_WAY_ONLY = {"kDifferentProducts": (SHARED, 128), "kNoAsyncFence": (SHARED, 0)}  # and no other way or span


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_a_mistake_shows_in_the_result(way: int, order: int) -> None:
    for mistake in SEEN_IN_THE_RESULT:
        outcome = multiply(way, 128, mistake, order=order)
        assert outcome.status != 0 or not outcome.error < 1, (mistake, outcome)
    assert not multiply(SHARED, 0, "kNoAsyncFence", order=order).error < 1


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_a_mistake_is_told(way: int, order: int) -> None:
    for mistake, message in TOLD.items():
        outcome = multiply(way, 128, mistake, order=order)
        assert outcome.status == -99 and re.search(message, outcome.failure), (mistake, outcome)
    outcome = multiply(SHARED, 128, "kDifferentProducts", order=order)
    assert outcome.status == -99 and "the threads of a warpgroup issue different products" in outcome.failure


def test_every_mistake_of_the_kernel_is_looked_for() -> None:
    assert {*MISTAKES} == {"kNone", *SEEN_IN_THE_RESULT, *TOLD, *ONE_WAY_ONLY}


def test_a_failure_ends_with_its_launch() -> None:
    assert multiply(SHARED, 128, "kTooManyBytes").status == -99
    assert multiply(SHARED, 128) == Outcome(0, "", multiply(SHARED, 128).error)


def test_the_emulation_has_every_function_that_kernels_may_call() -> None:
    declared = r"(?:U4D_HOPPER|inline|^) ?[\w:]+ (\w+)\("
    headers = [(KERNELS / "common" / name).read_text() for name in ("hopper.h", "hopper_wgmma.h")]
    real = {name for text in headers for name in re.findall(declared, text, re.MULTILINE)}
    emulated = (KERNELS / "common" / "hopper_shim.h").read_text()
    assert {"barrier_wait", "tma_load_4d", "wgmma_shared", "exp2_approx", "wgmma_registers_e4m3"} <= real
    assert [name for name in sorted(real) if not re.search(rf"\b{name}\(", emulated)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_a_gpu_agrees(way: int, span: int) -> None:
    """The same source on the real machine: what is emulated is what the hardware does."""
    library = gpu_library(SOURCE)
    for depth, columns in ((256, None), (128, 88)):
        a, b = factors(way, depth, columns)
        if columns and span == 0:
            continue  # without the copy engine nothing is filled up
        status, d = product_by(library, way, span, a.cuda(), b.cuda())
        assert status == 0 and largest_error(d, a, b) < 1e-4
