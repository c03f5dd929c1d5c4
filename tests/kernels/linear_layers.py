"""Linear layers of several streams for the tests of their kernels, and the rule these are held to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from u4d_fast.fp8 import Fp8Rows
from u4d_fast.reference.grouped_linear import grouped_linear, grouped_linear_fp8
from u4d_fast.reference.quantize_rows import quantize_rows


class Shape(NamedTuple):
    """x `[streams,rows,depth]`, weight `[streams,columns,depth]`."""

    streams: int
    rows: int
    columns: int
    depth: int


def make(
    shape: Shape, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; a column's results have a size of their own, so that a wrong one shows."""
    generator = torch.Generator(device).manual_seed(seed)
    streams, rows, columns, depth = shape
    x = torch.randn(streams, rows, depth, generator=generator, device=device)
    weight = torch.randn(streams, columns, depth, generator=generator, device=device) / depth**0.5
    weight = weight * (0.5 + torch.rand(streams, columns, 1, generator=generator, device=device))
    bias = torch.randn(streams, columns, generator=generator, device=device)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def make_fp8(shape: Shape, device: str = "cpu", seed: int = 0) -> tuple[Fp8Rows, Fp8Rows, Tensor]:
    """The same in e4m3, and a bias in bfloat16."""
    x, weight, bias = make(shape, torch.float32, device, seed)
    return quantize_rows(x), quantize_rows(weight), bias.bfloat16()


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """In float64."""
    return grouped_linear(x.double(), weight.double(), None if bias is None else bias.double(), gelu)


def check(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
    """Held against torch in bfloat16."""
    assert_no_worse(found, grouped_linear(x, weight, bias, gelu), exact_product(x, weight, bias, gelu))


def check_fp8(found: Tensor, x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None, gelu: bool) -> None:
    """Held against torch's product of the same values in float32, rounded to bfloat16."""
    factors = [values.double() * scale.double()[..., None] for values, scale in (x, weight)]
    exact = exact_product(factors[0], factors[1], bias, gelu)
    assert_no_worse(found, grouped_linear_fp8(x, weight, bias, gelu), exact)


def assert_no_worse(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The rule of all kernels, on the device where the tensors are: at most twice plain torch's error, and a floor.

    It holds for the largest error, for the norm of all, and with more room for each tile.
    """
    assert found.dtype == plain.dtype == torch.bfloat16 and found.shape == plain.shape == exact.shape
    if not exact.numel():
        return
    step = 2.0**-8
    ours, theirs = (found.double() - exact).abs(), (plain.double() - exact).abs()
    assert ours.max() <= 2 * theirs.max() + step * exact.abs().max(), (ours.max(), theirs.max())
    assert ours.norm() <= 2 * theirs.norm() + step * exact.norm(), (ours.norm(), theirs.norm())
    for our_tile, their_tile, tile in zip(*map(tiles, (ours, theirs, exact)), strict=True):
        assert (our_tile <= 2 * their_tile + 4 * step * (tile + 0.1)).all()


def tiles(x: Tensor) -> list[Tensor]:
    """The largest magnitude of each row in each 64 columns."""
    return [part.abs().amax(-1) for part in x.split(64, -1)]
