"""The emulation of e4m3 products and of copies out of shared memory: right kernels run, every mistake shows.

hopper_fp8.cu multiplies e4m3 matrices and lets the copy engine write the result, with one mistake of choice.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from machine_code import gpu_library
from shim_compiler import cached_library
from torch import Tensor

SOURCE = Path(__file__).with_name("hopper_fp8.cu")
MISTAKES = re.search(r"enum Mistake \{(.*?)\}", SOURCE.read_text(), re.DOTALL)[1].replace(",", " ").split()  # type: ignore[index]
SHARED, REGISTERS = 0, 1  # where a comes from
SPANS = (0, 128)  # bytes within which 16-byte pieces of the result are permuted in shared memory
GUARD = 7.0  # around the result


@dataclass(frozen=True)
class Outcome:
    """Status 0 or a failure that the emulation tells; d `[rows,columns]`, its float64 value, and d[0,0] read back."""

    status: int
    failure: str
    d: Tensor
    exact: Tensor
    echo: float

    @property
    def error(self) -> float:
        return (self.d - self.exact).abs().amax().item()


def multiply(
    way: int,
    span: int,
    mistake: str = "kNone",
    rows: int = 64,
    columns: int = 320,
    depth: int = 256,
    order: int = 0,
    device: str = "cpu",
) -> Outcome:
    """d = a b with random e4m3 matrices; d lies in a larger tensor that must stay as it is."""
    generator = torch.Generator().manual_seed(depth + columns)
    a, b = (torch.randn(size, depth, generator=generator).to(torch.float8_e4m3fn) for size in (64, columns))
    around = torch.full((rows + 2, columns), GUARD, device=device)
    around[1:-1] = torch.nan
    echo = torch.full((1,), torch.nan, device=device)
    library = gpu_library(SOURCE) if device == "cuda" else cached_library("hopper_fp8", [SOURCE])
    if device == "cpu":
        library.u4d_shim_failure.restype = ctypes.c_char_p
        library.u4d_shim_last_thread_first(order)
        library.u4d_shim_strict_fences(1)
    given = [a.to(device), b.to(device), around[1:], echo]
    sizes = [depth, rows, columns, way, span, MISTAKES.index(mistake)]
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in given)
    status = library.hopper_fp8(None, *pointers, *map(ctypes.c_int64, sizes))
    failure = "" if device == "cuda" else library.u4d_shim_failure().decode()
    around = around.cpu()
    assert (around[[0, -1]] == GUARD).all(), "the kernel wrote outside its tensor"
    exact = a[:rows].double() @ b.double().T
    return Outcome(status, failure, around[1:-1].double(), exact, echo.item())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_a_right_kernel_gives_the_product(way: int, span: int, order: int) -> None:
    outcome = multiply(way, span, order=order)
    assert (outcome.status, outcome.failure) == (0, "") and outcome.error < 1e-4, outcome
    assert outcome.echo == outcome.d[0, 0]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_what_is_outside_of_a_tensor_is_not_written(way: int, span: int) -> None:
    outcome = multiply(way, span, rows=41, columns=76, depth=144)  # no multiples of a tile
    assert outcome.status == 0 and outcome.error < 1e-4, outcome


SEEN_IN_THE_RESULT = {"kWrongStep": (SHARED, REGISTERS), "kBytesSwapped": (REGISTERS,)}
TOLD = {
    "kNoStoreFence": "written without fence_async_shared",
    "kFenceOfOneThread": "written without fence_async_shared",
    "kNoReadWait": "was written while a copy from it was under way",
    "kReadWaitTooLax": "was written while a copy from it was under way",
    "kReadWaitUnseen": "was written while a copy from it was under way",
    "kLoadedOver": "a copy into shared memory from byte .*, which a copy of thread 0 may still read",
    "kNotCommitted": "the block ended while .* copies of thread 0 may still read its shared memory",
    "kNoWaitAtEnd": "the block ended while .* copies of thread 0 may still read its shared memory",
    "kUnalignedSource": "a copy's source .* is not aligned",
}


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_a_mistake_shows(way: int, order: int) -> None:
    for mistake, ways in SEEN_IN_THE_RESULT.items():
        assert way not in ways or not multiply(way, 128, mistake, order=order).error < 1, mistake
    for mistake, message in TOLD.items():
        outcome = multiply(way, 128, mistake, columns=480, depth=128, order=order)
        assert outcome.status == -99 and re.search(message, outcome.failure), (mistake, outcome.failure)
    early = multiply(way, 128, "kNoWriteWait", order=order)  # reads d before it has come; at the end it has
    assert early.status == 0 and early.error < 1e-4 and early.echo != early.echo


def test_every_mistake_of_the_kernel_is_looked_for() -> None:
    assert {*MISTAKES} == {"kNone", *SEEN_IN_THE_RESULT, *TOLD, "kNoWriteWait"}


def numbers_around_e4m3() -> Tensor:
    """Every e4m3 number, the middles between neighbours, what lies next to these, and what has no place."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[~every.isnan()].unique()
    middles = (finite[1:] + finite[:-1]) / 2
    near = torch.cat([torch.nextafter(middles, torch.full_like(middles, side)) for side in (-1e9, 1e9)])
    large = torch.tensor([449.0, 1e9, torch.inf, 1e-30, 0.0])
    numbers = torch.cat([finite, middles, near, large, -large, torch.tensor([torch.nan])])
    return torch.cat([numbers, numbers.new_zeros(-len(numbers) % 4)])


def packed_e4m3(numbers: Tensor, device: str) -> Tensor:
    library = gpu_library(SOURCE) if device == "cuda" else cached_library("hopper_fp8", [SOURCE])
    given, packed = numbers.to(device), torch.zeros(len(numbers) // 4, dtype=torch.int32, device=device)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (given, packed))
    assert library.hopper_pack_e4m3(None, *pointers, ctypes.c_int64(len(packed))) == 0
    return packed.cpu().view(torch.uint8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packing_rounds_as_torch_does_and_saturates(device: str) -> None:
    numbers = numbers_around_e4m3()
    expected = numbers.clamp(-448, 448).to(torch.float8_e4m3fn)
    found = packed_e4m3(numbers, device).view(torch.float8_e4m3fn)
    assert torch.equal(found.isnan(), numbers.isnan())
    seen = ~numbers.isnan()
    assert torch.equal(found.view(torch.uint8)[seen], expected.view(torch.uint8)[seen])


@pytest.mark.gpu
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("way", [SHARED, REGISTERS])
def test_a_gpu_agrees(way: int, span: int) -> None:
    """The same source on the real machine, whose sums keep fewer bits."""
    for sizes in ({}, {"rows": 41, "columns": 76, "depth": 144}):
        outcome = multiply(way, span, device="cuda", **sizes)
        assert outcome.status == 0 and outcome.error < 1e-2 * outcome.exact.abs().amax(), outcome
        assert outcome.echo == outcome.d[0, 0]
