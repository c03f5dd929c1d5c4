"""bias_gelu_fp8 against the two ops it joins, and its kernels against float64."""

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
from u4d_fast.ops.bias_gelu import bias_gelu
from u4d_fast.ops.bias_gelu_fp8 import bias_gelu_fp8
from u4d_fast.ops.quantize_rows import quantize_rows
from u4d_fast.reference.bias_gelu import bias_gelu as reference_bias_gelu
from u4d_fast.reference.bias_gelu_fp8 import bias_gelu_fp8 as reference_bias_gelu_fp8

HostShim = Callable[[str, str], AbstractContextManager[None]]
SHAPES = [
    (1, 1, 1),
    (2, 3, 7),
    (4, 2, 5, 48),
    (3, 9, 250),
    (2, 2, 2, 3, 264),
    (2, 1, 1536),
    (1, 3, 8960),
    (1, 2, 13824),
]
EMPTY = [(2, 0, 8), (0, 3, 8)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, bias_dtype: torch.dtype | None = None):
    """Values that reach both tails of GELU, and a bias in x's dtype."""
    generator = torch.Generator().manual_seed(0)
    x = 3.0 * torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], shape[-1], generator=generator)
    return x.to(dtype), bias.to(bias_dtype or dtype)


def run(given: tuple[Tensor, Tensor], backend: str) -> Fp8Rows:
    """The op on the device of its backend."""
    x, bias = (tensor.to(device_of(backend)) for tensor in given)
    return bias_gelu_fp8(x, bias, backend=backend)


def check(found: Fp8Rows, given: tuple[Tensor, Tensor]) -> None:
    exact = reference_bias_gelu(*(tensor.double() for tensor in given))
    assert_rows(found, reference_bias_gelu_fp8(*given), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rows_are_as_near_as_e4m3_lets_be(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for bias_dtype in {dtype, torch.float32}:
        given = make(shape, dtype, bias_dtype)
        check(run(given, backend), given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_it_is_the_two_ops_one_after_the_other(backend: str, dtype: torch.dtype) -> None:
    """In float32, without a rounding between."""
    for shape in SHAPES:
        x, bias = (tensor.to(device_of(backend)) for tensor in make(shape, dtype))
        activated = bias_gelu(x.float(), bias.float(), backend=backend)
        assert same_bits(run((x, bias), backend), quantize_rows(activated, backend=backend))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_strided_inputs(backend: str) -> None:
    x, bias = (tensor.to(device_of(backend)) for tensor in make((3, 5, 48), torch.bfloat16))
    expected = bias_gelu_fp8(x, bias, backend=backend)
    assert same_bits(bias_gelu_fp8(x.mT.contiguous().mT, bias.mT.contiguous().mT, backend=backend), expected)
    wide = torch.cat((x, x), -1)[..., :48]
    assert same_bits(bias_gelu_fp8(wide, bias, backend=backend), expected)
    one = bias_gelu_fp8(x, bias[:1].expand(3, 48), backend=backend)
    assert same_bits(Fp8Rows(one.values[:1], one.scale[:1]), Fp8Rows(expected.values[:1], expected.scale[:1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str, dtype: torch.dtype) -> None:
    for shape in ((4, 33, 264), (3, 21, 77)):
        given = make(shape, dtype)
        with new_memory_is_nan():
            first, second = run(given, backend), run(given, backend)
        assert_written(first)
        assert same_bits(first, second)


def special() -> tuple[Tensor, Tensor]:
    """A row of zeros, and rows with what is no number in them."""
    x, bias = make((2, 4, 40))
    x[0, 1] = -bias[0]
    x[0, 2, 3], x[1, 0, 39] = torch.nan, torch.inf
    return x, bias


def check_special(found: Fp8Rows) -> None:
    not_finite = torch.zeros(2, 4, dtype=torch.bool)
    not_finite[0, 2] = not_finite[1, 0] = True
    assert_not_finite_rows(found, not_finite)
    assert found.scale[0, 1] == 1 and not found.values[0, 1].float().any()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rows_of_zeros_and_of_what_is_no_number(backend: str) -> None:
    check_special(run(special(), backend))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, *EMPTY]:
        for bias_dtype in {dtype, torch.float32}:
            given = make(shape, dtype, bias_dtype)
            with host_shim("bias_gelu_fp8", order), new_memory_is_nan():
                found = run(given, "cpu")
            check(found, given)


def test_cuda_source_on_special_rows(host_shim: HostShim) -> None:
    with host_shim("bias_gelu_fp8", "forward"):
        check_special(run(special(), "cpu"))


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    x, bias = (tensor.cuda() for tensor in make((4, 420, 8960), torch.bfloat16))
    assert same_bits(on_another_stream(bias_gelu_fp8, x, bias), bias_gelu_fp8(x, bias, backend="cuda"))


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    torch.library.opcheck(torch.ops.u4d_fast.bias_gelu_fp8.default, make((2, 3, 8), torch.bfloat16))


def test_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_compiles_to_one_call(monkeypatch, "bias_gelu_fp8", bias_gelu_fp8, *make((2, 3, 8)))


def test_gradients_are_refused() -> None:
    assert_refuses_gradients(bias_gelu_fp8, *make((2, 3, 8)))


def test_very_wide_rows_take_the_reference() -> None:
    given = make((1, 2, 16392))
    assert same_bits(bias_gelu_fp8(*given), reference_bias_gelu_fp8(*given))
    with pytest.raises(BackendError, match="the kernels take at most 16384 channels, got 16392"):
        bias_gelu_fp8(*given, backend="cpu")


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 8), r"x: expected \[S,...,D\] with at least three dimensions, got \[2,8\]"),
        (torch.zeros(2, 3, 0), torch.zeros(2, 0), r"x: expected \[...,D\] with at least one column, got \[2,3,0\]"),
        (torch.zeros(2, 3, 8), torch.zeros(8), r"bias: expected \[S,D\], got \[8\]"),
        (torch.zeros(2, 3, 8), torch.zeros(3, 8), r"bias: expected \[2,8\] to match x \[2,3,8\], got \[3,8\]"),
    ],
)
def test_bad_arguments(x: Tensor, bias: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_gelu_fp8(x, bias)
