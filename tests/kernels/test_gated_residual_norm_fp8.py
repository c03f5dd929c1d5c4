"""gated_residual_norm_fp8 against the two ops it joins, and its kernels against float64."""

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
    assert_no_worse,
    device_of,
    lay_out,
    new_memory_is_nan,
    tables,
)
from fp8_checks import (
    assert_not_finite_rows,
    assert_refuses_gradients,
    assert_rows,
    assert_written,
    on_another_stream,
    same_bits,
)
from torch import Tensor

from u4d_fast.fp8 import Fp8Rows
from u4d_fast.ops.ada_layer_norm_fp8 import ada_layer_norm_fp8
from u4d_fast.ops.gated_residual import gated_residual
from u4d_fast.ops.gated_residual_norm_fp8 import gated_residual_norm_fp8
from u4d_fast.reference.ada_layer_norm import ada_layer_norm as reference_ada_layer_norm
from u4d_fast.reference.ada_layer_norm_fp8 import ada_layer_norm_fp8 as reference_ada_layer_norm_fp8

HostShim = Callable[[str, str], AbstractContextManager[None]]
Result = tuple[Tensor, Fp8Rows]
EPS = 1e-6


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (*activations(shape, dtype, 2), *tables(shape, 3))


def run(given: tuple[Tensor, ...], backend: str) -> Result:
    """The op on the device of its backend."""
    return gated_residual_norm_fp8(*(tensor.to(device_of(backend)) for tensor in given), eps=EPS, backend=backend)


def both_ops(given: tuple[Tensor, ...], backend: str) -> Result:
    x, update, gate, shift, scale = (tensor.to(device_of(backend)) for tensor in given)
    x_new = gated_residual(x, update, gate, backend=backend)
    return x_new, ada_layer_norm_fp8(x_new, shift, scale, EPS, backend=backend)


def same(one: Result, other: Result) -> bool:
    return torch.equal(one[0], other[0]) and same_bits(one[1], other[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_it_is_the_two_ops_one_after_the_other(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("the kernels take no float64")
    for shape in [*SHAPES, *EMPTY]:
        given = make(shape, dtype)
        assert same(run(given, backend), both_ops(given, backend))


def check_norm(found: Result, given: tuple[Tensor, ...]) -> None:
    """The norm by the rule, which is held to the truth of x_new as it was rounded: its definition."""
    x_new, (shift, scale) = found[0].cpu(), given[3:]
    exact = reference_ada_layer_norm(x_new.double(), shift.double(), scale.double(), EPS)
    assert_rows(found[1], reference_ada_layer_norm_fp8(x_new, shift, scale, EPS), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rows_are_as_near_as_e4m3_lets_be(backend: str, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, *EMPTY]:
        given = make(shape, dtype)
        check_norm(run(given, backend), given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_any_layout_gives_the_same_bits(backend: str, layout: str) -> None:
    x, update, *dense = (tensor.to(device_of(backend)) for tensor in make(Shape(2, 3, 4, 3, 72), torch.bfloat16))
    laid_out = [lay_out(table, layout) for table in dense]
    strided = [tensor.mT.contiguous().mT for tensor in (x, update)]
    assert not strided[0].is_contiguous() and not any(table.is_contiguous() for table in laid_out)
    expected = gated_residual_norm_fp8(x, update, *(table.contiguous() for table in laid_out), backend=backend)
    assert same(gated_residual_norm_fp8(*strided, *laid_out, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str, dtype: torch.dtype) -> None:
    for shape in (Shape(2, 2, 3, 5, 1536), Shape(3, 1, 2, 7, 77)):
        given = make(shape, dtype)
        with new_memory_is_nan():
            first, second = run(given, backend), run(given, backend)
        assert first[0].isfinite().all()
        assert_written(first[1])
        assert same(first, second)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nan_stays_in_its_row(backend: str) -> None:
    given = make(Shape(1, 2, 2, 3, 40))
    given[1][0, 1, 2, 5] = torch.nan
    x_new, normed = run(given, backend)
    rows = torch.zeros(1, 2, 6, dtype=torch.bool)
    rows[0, 1, 2] = True
    assert x_new.isnan().sum() == 1
    assert_not_finite_rows(normed, rows)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [Shape(1, 1, 1, 1, 1), Shape(2, 2, 3, 3, 64), Shape(2, 1, 2, 2, 77), *SHAPES[-5:], *EMPTY]:
        given = make(shape, dtype)
        with host_shim("gated_residual_norm_fp8", order), new_memory_is_nan():
            found = run(given, "cpu")
        exact = gated_residual(*(tensor.double() for tensor in given[:3]))
        assert_no_worse(found[0], gated_residual(*given[:3], backend="reference"), exact)
        check_norm(found, given)


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    given = [tensor.to("cuda") for tensor in make(Shape(4, 1, 14, 30, 1536), torch.bfloat16)]
    assert same(on_another_stream(gated_residual_norm_fp8, *given), gated_residual_norm_fp8(*given, backend="cuda"))


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    given = make(Shape(2, 1, 2, 3, 8), torch.bfloat16)
    torch.library.opcheck(torch.ops.u4d_fast.gated_residual_norm_fp8.default, (*given, EPS))


def test_compiles_whole() -> None:
    given = make(Shape(2, 1, 2, 3, 8))
    compiled = torch.compile(lambda *tensors: gated_residual_norm_fp8(*tensors), fullgraph=True, backend="aot_eager")
    assert same(compiled(*given), gated_residual_norm_fp8(*given))


def test_gradients_are_refused() -> None:
    assert_refuses_gradients(gated_residual_norm_fp8, *make(Shape(2, 1, 2, 3, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": torch.zeros(2, 1, 7, 8)}, r"update: expected \[2,1,6,8\] to match x \[2,1,6,8\], got \[2,1,7,8\]"),
        ({"scale": torch.zeros(2, 1, 2, 1)}, r"scale: expected \[2,1,2,8\] to match x"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    names = ("x", "update", "gate", "shift", "scale")
    given = dict(zip(names, make(Shape(2, 1, 2, 3, 8)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        gated_residual_norm_fp8(**given)
