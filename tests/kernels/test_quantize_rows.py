"""quantize_rows against its definition; its kernels give the reference's bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from block_rows import DTYPES, KERNELS, ORDERS, device_of, new_memory_is_nan
from fp8_checks import (
    assert_compiles_to_one_call,
    assert_not_finite_rows,
    assert_refuses_gradients,
    assert_rows,
    assert_written,
    on_another_stream,
    same_bits,
)
from torch import Tensor

from u4d_fast.backend import BackendError
from u4d_fast.fp8 import Fp8Rows
from u4d_fast.ops.quantize_rows import quantize_rows
from u4d_fast.reference.quantize_rows import quantize_rows as reference_quantize_rows

HostShim = Callable[[str, str], AbstractContextManager[None]]

# Widths: one column, odd ones, part of a warp, wan-1.3b's two, and one more than a warp of four chunks; rows that do
# not fill their last block.
SHAPES = [(1,), (5, 1), (2, 3, 7), (9, 48), (3, 250), (17, 264), (2, 1000), (5, 1536), (3, 8960), (2, 1025)]
WIDEST = [(1, 16384), (2, 13824)]
EMPTY = [(0, 8), (2, 0, 3)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values; every row has its own magnitude."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = (torch.rand(*shape[:-1], 1, generator=generator) * 8 - 4).exp()
    return (torch.randn(shape, generator=generator) * magnitudes).to(dtype)


def run(x: Tensor, backend: str) -> Fp8Rows:
    """The op on the device of its backend."""
    return quantize_rows(x.to(device_of(backend)), backend=backend)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reference_is_the_definition(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = make(shape, dtype)
        found = reference_quantize_rows(x)
        assert_rows(found, found, x.double())
        values = found.values.float()
        assert torch.equal(values.abs().amax(-1), torch.full(shape[:-1], 448.0))
        torch.testing.assert_close(found.dequantize(), x.float(), rtol=2.0**-4, atol=0.001 * found.scale.max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDEST, *EMPTY])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_gives_the_references_bits(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make(shape, dtype)
    assert same_bits(run(x, backend), reference_quantize_rows(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_every_half_way_value(backend: str, dtype: torch.dtype) -> None:
    """A row whose largest is 448 has the scale 1: what is between two codes shows how it is rounded."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).to(dtype)
    values = values[values.abs() <= 448]
    rows = torch.cat((values, values.new_full((-values.numel() % 255,), 448.0))).view(-1, 255)
    found = run(torch.cat((rows, torch.full_like(rows[:, :1], 448.0)), -1), backend)
    assert (found.scale == 1).all()
    expected = rows.float().to(torch.float8_e4m3fn)
    assert torch.equal(found.values[:, :-1].cpu().view(torch.uint8), expected.view(torch.uint8))


def special_rows() -> Tensor:
    """Zeros, NaN, both infinities, numbers that are not normal, the largest."""
    rows = make((9, 40))
    rows[0] = 0.0
    rows[1, 39] = torch.nan
    rows[2, 7] = torch.inf
    rows[3, 0] = -torch.inf
    rows[4] *= 1e-42
    rows[5] *= 3e38 / rows[5].abs().max()
    rows[6] = -0.0
    rows[7, 3:5] = torch.tensor([torch.nan, torch.inf])
    return rows


def check_special_rows(found: Fp8Rows) -> None:
    rows = special_rows()
    not_finite = ~rows.isfinite().all(-1)
    assert_not_finite_rows(found, not_finite)
    assert found.scale[0] == 1 and found.scale[6] == 1 and found.scale[4] == 2.0**-126
    assert not found.values[0].float().any() and not found.values[6].float().any()
    kept, expected = found.dequantize().cpu()[~not_finite], rows[~not_finite]
    torch.testing.assert_close(kept, expected, rtol=2.0**-4, atol=2.0**-136)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rows_of_zeros_and_of_what_is_no_number(backend: str) -> None:
    check_special_rows(run(special_rows(), backend))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_strided_inputs(backend: str) -> None:
    x = make((3, 5, 48), torch.bfloat16).to(device_of(backend))
    expected = quantize_rows(x, backend=backend)
    wide = torch.cat((x, x), -1)
    shifted = x.new_full((x.numel() + 1,), torch.nan)
    shifted[1:] = x.flatten()
    for other in (x.mT.contiguous().mT, wide[..., 48:], shifted[1:].view_as(x)):
        assert same_bits(quantize_rows(other, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str, dtype: torch.dtype) -> None:
    for shape in ((33, 1536), (21, 77)):
        x = make(shape, dtype)
        with new_memory_is_nan():
            first, second = run(x, backend), run(x, backend)
        assert_written(first)
        assert same_bits(first, second)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, *WIDEST, *EMPTY]:
        x = make(shape, dtype)
        with host_shim("quantize_rows", order), new_memory_is_nan():
            found = run(x, "cpu")
        assert same_bits(found, reference_quantize_rows(x))


def test_cuda_source_on_special_rows(host_shim: HostShim) -> None:
    with host_shim("quantize_rows", "forward"):
        check_special_rows(run(special_rows(), "cpu"))


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    x = make((4, 4200, 1536), torch.bfloat16).cuda()
    assert same_bits(on_another_stream(quantize_rows, x), quantize_rows(x, backend="cuda"))


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    torch.library.opcheck(torch.ops.u4d_fast.quantize_rows.default, (make((2, 3, 8), torch.bfloat16),))


def test_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_compiles_to_one_call(monkeypatch, "quantize_rows", quantize_rows, make((2, 3, 8)))


def test_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"x: expected a tensor \[\.\.\.,D\], got list"):
        quantize_rows([1.0, 2.0])  # type: ignore[arg-type]


def test_gradients_are_refused() -> None:
    assert_refuses_gradients(quantize_rows, make((2, 3, 8)))


def test_double_and_very_wide_rows_take_the_reference() -> None:
    x = make((2, 16392))
    assert same_bits(quantize_rows(x), reference_quantize_rows(x))
    with pytest.raises(BackendError, match="the kernels take at most 16384 channels, got 16392"):
        quantize_rows(x, backend="cpu")
    assert same_bits(quantize_rows(x.double()), reference_quantize_rows(x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 0), ValueError, r"x: expected \[...,D\] with at least one column, got \[2,0\]"),
        (torch.tensor(1.0), ValueError, r"x: expected \[...,D\] with at least one column, got \[\]"),
        (torch.zeros(2, 3).long(), TypeError, r"x: expected a floating dtype, got torch\.int64"),
        (torch.zeros(2, 3).to(torch.float8_e4m3fn), TypeError, r"x: expected float32, .* got torch\.float8_e4m3fn"),
    ],
)
def test_bad_arguments(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_rows(x)
