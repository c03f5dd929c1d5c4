"""ada_layer_norm_fp8 against the two ops it joins, and its kernels against float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from block_rows import (
    DTYPES,
    EMPTY,
    KERNELS,
    LAYOUTS,
    ORDERS,
    SHAPES,
    Shape,
    activations,
    device_of,
    lay_out,
    new_memory_is_nan,
    tables,
)
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
from u4d_fast.ops.ada_layer_norm import ada_layer_norm
from u4d_fast.ops.ada_layer_norm_fp8 import ada_layer_norm_fp8
from u4d_fast.ops.quantize_rows import quantize_rows
from u4d_fast.reference.ada_layer_norm import ada_layer_norm as reference_ada_layer_norm
from u4d_fast.reference.ada_layer_norm_fp8 import ada_layer_norm_fp8 as reference_ada_layer_norm_fp8

HostShim = Callable[[str, str], AbstractContextManager[None]]
EPS = 1e-6


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (*activations(shape, dtype, 1), *tables(shape, 2))  # type: ignore[return-value]


def run(given: tuple[Tensor, ...], backend: str) -> Fp8Rows:
    """The op on the device of its backend."""
    return ada_layer_norm_fp8(*(tensor.to(device_of(backend)) for tensor in given), eps=EPS, backend=backend)


def check(found: Fp8Rows, given: tuple[Tensor, ...]) -> None:
    exact = reference_ada_layer_norm(*(tensor.double() for tensor in given), EPS)
    assert_rows(found, reference_ada_layer_norm_fp8(*given, EPS), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rows_are_as_near_as_e4m3_lets_be(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    given = make(shape, dtype)
    check(run(given, backend), given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_it_is_the_two_ops_one_after_the_other(backend: str, dtype: torch.dtype) -> None:
    """In float32, without a rounding between."""
    for shape in SHAPES:
        x, shift, scale = (tensor.to(device_of(backend)) for tensor in make(shape, dtype))
        normed = ada_layer_norm(x.float(), shift, scale, EPS, backend=backend)
        assert same_bits(run((x, shift, scale), backend), quantize_rows(normed, backend=backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_any_layout_gives_the_same_bits(backend: str, layout: str) -> None:
    x, shift, scale = (tensor.to(device_of(backend)) for tensor in make(Shape(2, 3, 4, 3, 72), torch.bfloat16))
    shift, scale = lay_out(shift, layout), lay_out(scale, layout)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous() and not (shift.is_contiguous() or scale.is_contiguous())
    expected = ada_layer_norm_fp8(x, shift.contiguous(), scale.contiguous(), backend=backend)
    assert same_bits(ada_layer_norm_fp8(strided, shift, scale, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str, dtype: torch.dtype) -> None:
    for shape in (Shape(2, 2, 3, 5, 1536), Shape(3, 1, 2, 7, 77)):
        given = make(shape, dtype)
        with new_memory_is_nan():
            first, second = run(given, backend), run(given, backend)
        assert_written(first)
        assert same_bits(first, second)


def special() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens without any variation, which become rows of zeros where the shift is 0, and some that are no number."""
    x, shift, scale = make(Shape(1, 2, 2, 3, 40))
    x[0, 0, 1] = 3.0
    shift[0, 0, 0] = 0.0
    x[0, 1, 2, 5], x[0, 1, 4, 39], shift[0, 0, 1, 7] = torch.nan, torch.inf, -torch.inf
    return x, shift, scale


def check_special(found: Fp8Rows) -> None:
    not_finite = torch.zeros(1, 2, 6, dtype=torch.bool)
    not_finite[0, 1, 2] = not_finite[0, 1, 4] = not_finite[0, 0, 3:] = True
    assert_not_finite_rows(found, not_finite)
    assert found.scale[0, 0, 1] == 1 and not found.values[0, 0, 1].float().any()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rows_of_zeros_and_of_what_is_no_number(backend: str) -> None:
    check_special(run(special(), backend))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [Shape(1, 1, 1, 1, 1), Shape(2, 2, 3, 3, 64), Shape(2, 1, 2, 2, 77), *SHAPES[-5:], *EMPTY]:
        given = make(shape, dtype)
        with host_shim("ada_layer_norm_fp8", order), new_memory_is_nan():
            found = run(given, "cpu")
        check(found, given)


def test_cuda_source_on_special_rows(host_shim: HostShim) -> None:
    with host_shim("ada_layer_norm_fp8", "forward"):
        check_special(run(special(), "cpu"))


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    given = [tensor.to("cuda") for tensor in make(Shape(4, 1, 14, 30, 1536), torch.bfloat16)]
    assert same_bits(on_another_stream(ada_layer_norm_fp8, *given), ada_layer_norm_fp8(*given, backend="cuda"))


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    given = make(Shape(2, 1, 2, 3, 8), torch.bfloat16)
    torch.library.opcheck(torch.ops.u4d_fast.ada_layer_norm_fp8.default, (*given, EPS))


def test_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(Shape(2, 1, 2, 3, 8))
    assert_compiles_to_one_call(monkeypatch, "ada_layer_norm_fp8", ada_layer_norm_fp8, *given)


def test_gradients_are_refused() -> None:
    assert_refuses_gradients(ada_layer_norm_fp8, *make(Shape(2, 1, 2, 3, 8)))


def test_double_and_very_wide_rows_take_the_reference() -> None:
    given = make(Shape(1, 1, 1, 2, 8200))
    assert same_bits(ada_layer_norm_fp8(*given), reference_ada_layer_norm_fp8(*given))
    with pytest.raises(BackendError, match="the kernels take at most 8192 channels, got 8200"):
        ada_layer_norm_fp8(*given, backend="cpu")
    double = tuple(tensor.double() for tensor in make(SHAPES[2]))
    check(ada_layer_norm_fp8(*double), double)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 1, 7, 8)}, r"x: expected \[S,B,T,D\] with T a multiple of the tables' 2 frames, got"),
        ({"x": torch.zeros(2, 1, 6, 0)}, r"x: expected \[S,B,T,D\] with at least one channel"),
        ({"scale": torch.zeros(2, 1, 3, 8)}, r"scale: expected \[2,1,2,8\] to match x \[2,1,6,8\], got \[2,1,3,8\]"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    given = dict(zip(("x", "shift", "scale"), make(Shape(2, 1, 2, 3, 8)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ada_layer_norm_fp8(**given)
