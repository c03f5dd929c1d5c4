"""Rounding to e4m3 by whole numbers (csrc/kernels/common/e4m3.h) against torch's own."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from shim_compiler import cached_library
from torch import Tensor


@pytest.fixture(scope="module")
def compiled() -> ctypes.CDLL:
    return cached_library("e4m3", [Path(__file__).with_name("e4m3_rounding.cu")])


def rounded(compiled: ctypes.CDLL, values: Tensor) -> Tensor:
    codes = torch.full(values.shape, 0x55, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, codes)]
    compiled.round_all(*pointers, ctypes.c_int64(values.numel()))
    return codes


def by_torch(values: Tensor) -> Tensor:
    """Torch's rounding of what e4m3 holds; NaN without a sign."""
    codes = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(values.isnan(), 0x7F, codes)


def numbers() -> Tensor:
    """Every e4m3 number, what lies half-way between neighbours, and the float32 numbers next to all of them."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half_way = torch.cat(((codes[1:] + codes[:-1]) / 2, torch.tensor([464.0, 480.0, 512.0, 3.4e38])))
    known = torch.cat((codes, half_way))
    inf = torch.tensor(torch.inf)
    near = torch.cat((known, known.nextafter(inf), known.nextafter(-inf)))
    return torch.cat((near, -near))


def all_of(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of a half type, as float32."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()


def random_bits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)


def in_range() -> Tensor:
    """Random magnitudes from far below the smallest number to the largest."""
    generator = torch.Generator().manual_seed(1)
    values = (torch.rand(200_000, generator=generator) * 24 - 14).exp2()
    return values * torch.randint(0, 2, values.shape, generator=generator).mul(2).sub(1)


SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 2.0**-126])


@pytest.mark.parametrize(
    "values",
    [all_of(torch.float16), all_of(torch.bfloat16), numbers(), random_bits(), in_range(), SPECIAL],
    ids=["float16", "bfloat16", "half-way", "any bits", "in range", "special"],
)
def test_rounds_like_torch(compiled: ctypes.CDLL, values: Tensor) -> None:
    assert torch.equal(rounded(compiled, values), by_torch(values))


def test_scale_of_a_row(compiled: ctypes.CDLL) -> None:
    largest = torch.tensor([448.0, -3.0, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 1e-36, 3.4e38])
    scale = torch.empty_like(largest)
    compiled.scale_all(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (largest, scale)), ctypes.c_int64(largest.numel())
    )
    nan, least = torch.nan, 2.0**-126
    expected = torch.tensor([1.0, 3.0 / 448, 1.0, 1.0, nan, nan, nan, least, least, 3.4e38 / 448])
    torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)
