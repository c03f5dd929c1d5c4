"""ada_layer_norm against its definition, its kernels against float64, and its gradients."""

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
from torch import Tensor

from u4d_fast.backend import BackendError
from u4d_fast.ops.ada_layer_norm import _grad_kernel, _grad_reference, ada_layer_norm
from u4d_fast.reference.ada_layer_norm import ada_layer_norm as reference_ada_layer_norm
from u4d_fast.reference.ada_layer_norm import ada_layer_norm_grad

HostShim = Callable[[str, str], AbstractContextManager[None]]
EPS = 1e-6


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (*activations(shape, dtype, 1), *tables(shape, 2))  # type: ignore[return-value]


def run(given: tuple[Tensor, ...], backend: str) -> Tensor:
    """The op on the device of its backend."""
    return ada_layer_norm(*(tensor.to(device_of(backend)) for tensor in given), eps=EPS, backend=backend)


def exactly(given: tuple[Tensor, ...]) -> Tensor:
    return reference_ada_layer_norm(*(tensor.double() for tensor in given), EPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_is_the_definition(dtype: torch.dtype) -> None:
    shape = Shape(2, 2, 3, 4, 10)
    x, shift, scale = (tensor.to(dtype) for tensor in make(shape))
    found = reference_ada_layer_norm(x, shift, scale, EPS)
    for token in range(shape.frames * shape.patches):
        row, frame = x[:, :, token], token // shape.patches
        deviation = (row.var(-1, correction=0, keepdim=True) + EPS).sqrt()
        expected = (row - row.mean(-1, keepdim=True)) / deviation * (1 + scale[:, :, frame]) + shift[:, :, frame]
        torch.testing.assert_close(found[:, :, token], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    given = make(shape, dtype)
    assert_no_worse(run(given, backend), reference_ada_layer_norm(*given, EPS), exactly(given))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_mean_far_from_zero_costs_no_digits(backend: str) -> None:
    x, shift, scale = make(Shape(1, 1, 2, 4, 1536))
    given = (x + 1000.0, shift, scale)
    results = run(given, backend), reference_ada_layer_norm(*given), exactly(given)
    assert_no_worse(*(result.flatten() for result in results))  # over all rows: in one, the mean's rounding decides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_any_layout_gives_the_same_bits(backend: str, layout: str) -> None:
    x, shift, scale = (tensor.to(device_of(backend)) for tensor in make(Shape(2, 3, 4, 3, 72), torch.bfloat16))
    shift, scale = lay_out(shift, layout), lay_out(scale, layout)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous() and not (shift.is_contiguous() or scale.is_contiguous())
    expected = ada_layer_norm(x, shift.contiguous(), scale.contiguous(), backend=backend)
    assert torch.equal(ada_layer_norm(strided, shift, scale, backend=backend), expected)


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nothing_gives_nothing(backend: str, shape: Shape) -> None:
    given = make(shape)
    assert run(given, backend).shape == given[0].shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str, dtype: torch.dtype) -> None:
    for shape in (Shape(2, 2, 3, 5, 1536), Shape(3, 1, 2, 7, 77)):
        given = make(shape, dtype)
        with new_memory_is_nan():
            first, second = run(given, backend), run(given, backend)
        assert first.isfinite().all() and torch.equal(first, second)


def test_threads_do_not_change_a_bit() -> None:
    given = make(Shape(2, 1, 3, 7, 333))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(run(given, "cpu"))
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nan_stays_in_its_row(backend: str) -> None:
    x, shift, scale = make(Shape(1, 2, 2, 3, 40))
    x[0, 1, 2, 5] = torch.nan
    found = run((x, shift, scale), backend).isnan()
    assert found[0, 1, 2].all() and found.sum() == 40


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [Shape(1, 1, 1, 1, 1), Shape(2, 2, 3, 3, 64), Shape(2, 1, 2, 2, 77), *SHAPES[-5:], *EMPTY]:
        given = make(shape, dtype)
        with host_shim("ada_layer_norm", order), new_memory_is_nan():
            found = run(given, "cpu")
        assert_no_worse(found, reference_ada_layer_norm(*given, EPS), exactly(given))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_source_reads_tables_where_they_lie(host_shim: HostShim, layout: str) -> None:
    x, shift, scale = make(Shape(2, 3, 4, 3, 72), torch.bfloat16)
    shift, scale = lay_out(shift, layout), lay_out(scale, layout)
    with host_shim("ada_layer_norm", "forward"):
        expected = ada_layer_norm(x, shift.contiguous(), scale.contiguous(), backend="cpu")
        assert torch.equal(ada_layer_norm(x, shift, scale, backend="cpu"), expected)


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    given = [tensor.to("cuda") for tensor in make(Shape(4, 1, 14, 30, 1536), torch.bfloat16)]
    expected = ada_layer_norm(*given, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = ada_layer_norm(*given, backend="cuda")
    stream.synchronize()
    assert torch.equal(found, expected)


# Gradients.


def test_gradients_by_gradcheck() -> None:
    given = [tensor.double().requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 5))]
    assert torch.autograd.gradcheck(lambda *a: reference_ada_layer_norm(*a, EPS), given)
    # The registered op takes the reference for float64, and its own backward.
    assert torch.autograd.gradcheck(lambda *a: torch.ops.u4d_fast.ada_layer_norm(*a, EPS), given)


def gradients(given: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    leaves = [tensor.to(device_of(backend)).requires_grad_() for tensor in given]
    out = ada_layer_norm(*leaves, eps=EPS, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(given[0].dtype)
    return torch.autograd.grad(out, leaves, weights.to(out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[1:5], SHAPES[6], *EMPTY])
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_are_no_worse_than_torchs(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    given = make(shape, dtype)
    exact = gradients(tuple(tensor.double() for tensor in given), "reference")
    plain, fast = gradients(given, "reference"), gradients(given, backend)
    for found, torchs, truth in zip(fast, plain, exact, strict=True):
        assert_no_worse(found, torchs, truth)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_are_the_same_each_time(backend: str) -> None:
    given = make(Shape(2, 2, 2, 70, 264), torch.bfloat16)
    first, second = gradients(given, backend), gradients(given, backend)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_backward_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    more = [Shape(2, 2, 2, 33, 16), Shape(1, 1, 1, 65, 40), Shape(1, 1, 2, 2, 2056)]
    for shape in [*SHAPES[:7], SHAPES[8], SHAPES[9], *more, *EMPTY]:
        x, _, scale = make(shape, dtype)
        (grad,) = activations(shape, dtype, 1, seed=7)
        with host_shim("ada_layer_norm", order), new_memory_is_nan():
            found = _grad_kernel(grad, x, scale, EPS)
        exact = ada_layer_norm_grad(grad.double(), x.double(), scale.double(), EPS)
        for ours, plain, truth in zip(found, _grad_reference(grad, x, scale, EPS), exact, strict=True):
            assert_no_worse(ours, plain, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_backward_takes_any_layout(host_shim: HostShim, layout: str) -> None:
    shape = Shape(2, 3, 4, 3, 72)
    x, _, scale = make(shape, torch.bfloat16)
    (grad,) = activations(shape, torch.bfloat16, 1, seed=7)
    scale = lay_out(scale, layout)
    with host_shim("ada_layer_norm", "forward"):
        expected = _grad_kernel(grad, x, scale.contiguous(), EPS)
        found = _grad_kernel(grad.mT.contiguous().mT, x, scale, EPS)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_an_expanded_table_gets_a_gradient_of_its_own_shape(backend: str) -> None:
    (x,) = activations(Shape(2, 3, 4, 3, 16), torch.float32, 1)
    x = x.to(device_of(backend))
    six = torch.randn(2, 1, 4, 6, 16).to(x).requires_grad_()
    out = ada_layer_norm(x, *six.expand(2, 3, 4, 6, 16).unbind(-2)[:2], backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), six)
    assert grad.shape == six.shape
    torch.testing.assert_close(grad[:, :, :, 0], torch.full((2, 1, 4, 16), 9.0).to(grad))
    assert not grad[..., 2:, :].any()


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    x, shift, scale = (tensor.requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 8), torch.bfloat16))
    torch.library.opcheck(torch.ops.u4d_fast.ada_layer_norm.default, (x, shift, scale, EPS))
    torch.library.opcheck(torch.ops.u4d_fast.ada_layer_norm_grad.default, (x.detach(), x.detach(), scale.detach(), EPS))


def test_compiles_whole_with_gradients() -> None:
    given = [tensor.requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 8))]

    def length(*tensors: Tensor) -> Tensor:
        return ada_layer_norm(*tensors).cos().sum()

    eager = torch.autograd.grad(length(*given), given)
    compiled = torch.autograd.grad(torch.compile(length, fullgraph=True, backend="aot_eager")(*given), given)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_double_and_very_wide_rows_take_the_reference() -> None:
    given = make(Shape(1, 1, 1, 2, 8200))
    assert torch.equal(ada_layer_norm(*given), reference_ada_layer_norm(*given))
    with pytest.raises(BackendError, match="the kernels take at most 8192 channels, got 8200"):
        ada_layer_norm(*given, backend="cpu")
    double = tuple(tensor.double() for tensor in make(SHAPES[2]))
    assert torch.equal(ada_layer_norm(*double), reference_ada_layer_norm(*double))


def test_half_tables_are_read_as_they_are() -> None:
    x, shift, scale = make(SHAPES[2], torch.bfloat16)
    shift, scale = shift.bfloat16(), scale.bfloat16()
    expected = ada_layer_norm(x, shift.float(), scale.float())
    assert torch.equal(ada_layer_norm(x, shift, scale), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 1, 8)}, r"x: expected \[S,B,T,D\], got \[2,1,8\]"),
        ({"x": torch.zeros(2, 1, 7, 8)}, r"x: expected \[S,B,T,D\] with T a multiple of the tables' 2 frames, got"),
        ({"x": torch.zeros(2, 1, 6, 0)}, r"x: expected \[S,B,T,D\] with at least one channel"),
        ({"scale": torch.zeros(2, 1, 3, 8)}, r"scale: expected \[2,1,2,8\] to match x \[2,1,6,8\], got \[2,1,3,8\]"),
        ({"shift": torch.zeros(2, 1, 2, 9)}, r"shift: expected \[2,1,2,8\] to match x"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    given = dict(zip(("x", "shift", "scale"), make(Shape(2, 1, 2, 3, 8)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        ada_layer_norm(**given)


def test_integers_are_refused() -> None:
    x, shift, scale = make(Shape(2, 1, 2, 3, 8))
    with pytest.raises(TypeError, match=r"x: expected float32, float64, bfloat16 or float16, got torch\.int64"):
        ada_layer_norm(x.long(), shift, scale)
    with pytest.raises(TypeError, match=r"shift: expected a floating dtype, got torch\.int64"):
        ada_layer_norm(x, shift.long(), scale)
