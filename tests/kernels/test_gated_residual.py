"""gated_residual against its definition, its kernels against float64, and its gradients."""

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
from u4d_fast.ops.gated_residual import gated_residual
from u4d_fast.reference.gated_residual import gated_residual as reference_gated_residual

HostShim = Callable[[str, str], AbstractContextManager[None]]


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (*activations(shape, dtype, 2), *tables(shape, 1))


def run(given: tuple[Tensor, ...], backend: str) -> Tensor:
    """The op on the device of its backend."""
    return gated_residual(*(tensor.to(device_of(backend)) for tensor in given), backend=backend)


def exactly(given: tuple[Tensor, ...]) -> Tensor:
    return reference_gated_residual(*(tensor.double() for tensor in given))


def test_reference_is_the_definition() -> None:
    shape = Shape(2, 2, 3, 4, 10)
    x, update, gate = make(shape)
    found = reference_gated_residual(x, update, gate)
    for token in range(shape.frames * shape.patches):
        expected = x[:, :, token] + update[:, :, token] * gate[:, :, token // shape.patches]
        torch.testing.assert_close(found[:, :, token], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    given = make(shape, dtype)
    assert_no_worse(run(given, backend), reference_gated_residual(*given), exactly(given))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_any_layout_gives_the_same_bits(backend: str, layout: str) -> None:
    x, update, gate = (tensor.to(device_of(backend)) for tensor in make(Shape(2, 3, 4, 3, 72), torch.bfloat16))
    gate = lay_out(gate, layout)
    strided = [tensor.mT.contiguous().mT for tensor in (x, update)]
    assert not strided[0].is_contiguous() and not gate.is_contiguous()
    expected = gated_residual(x, update, gate.contiguous(), backend=backend)
    assert torch.equal(gated_residual(*strided, gate, backend=backend), expected)


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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [Shape(1, 1, 1, 1, 1), Shape(2, 2, 3, 3, 64), Shape(2, 1, 2, 2, 77), *SHAPES[-5:], *EMPTY]:
        given = make(shape, dtype)
        with host_shim("gated_residual", order), new_memory_is_nan():
            found = run(given, "cpu")
        assert_no_worse(found, reference_gated_residual(*given), exactly(given))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_source_reads_the_gate_where_it_lies(host_shim: HostShim, layout: str) -> None:
    x, update, gate = make(Shape(2, 3, 4, 3, 72), torch.bfloat16)
    gate = lay_out(gate, layout)
    with host_shim("gated_residual", "forward"):
        expected = gated_residual(x, update, gate.contiguous(), backend="cpu")
        assert torch.equal(gated_residual(x, update, gate, backend="cpu"), expected)


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    given = [tensor.to("cuda") for tensor in make(Shape(4, 1, 14, 30, 1536), torch.bfloat16)]
    expected = gated_residual(*given, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = gated_residual(*given, backend="cuda")
    stream.synchronize()
    assert torch.equal(found, expected)


# Gradients.


def test_gradients_by_gradcheck() -> None:
    given = [tensor.double().requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 5))]
    assert torch.autograd.gradcheck(reference_gated_residual, given)
    # The registered op takes the reference for float64, and its own backward.
    assert torch.autograd.gradcheck(torch.ops.u4d_fast.gated_residual, given)


def gradients(given: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    leaves = [tensor.to(device_of(backend)).requires_grad_() for tensor in given]
    out = gated_residual(*leaves, backend=backend)
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


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_an_expanded_gate_gets_a_gradient_of_its_own_shape(backend: str) -> None:
    x, update = (tensor.to(device_of(backend)) for tensor in activations(Shape(2, 3, 4, 3, 16), torch.float32, 2))
    gate = torch.randn(2, 1, 1, 16).to(x).requires_grad_()
    (grad,) = torch.autograd.grad(gated_residual(x, update, gate.expand(2, 3, 4, 16), backend=backend).sum(), gate)
    torch.testing.assert_close(grad, update.sum((1, 2))[:, None, None])


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    given = [tensor.requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 8), torch.bfloat16)]
    torch.library.opcheck(torch.ops.u4d_fast.gated_residual.default, given)


def test_compiles_whole_with_gradients() -> None:
    given = [tensor.requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 8))]

    def length(*tensors: Tensor) -> Tensor:
        return gated_residual(*tensors).cos().sum()

    eager = torch.autograd.grad(length(*given), given)
    compiled = torch.autograd.grad(torch.compile(length, fullgraph=True, backend="aot_eager")(*given), given)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_double_and_very_wide_rows_take_the_reference() -> None:
    given = make(Shape(1, 1, 1, 2, 8200))
    assert torch.equal(gated_residual(*given), reference_gated_residual(*given))
    with pytest.raises(BackendError, match="gated_residual: backend 'cpu' cannot run: the kernels take at most 8192"):
        gated_residual(*given, backend="cpu")
    double = tuple(tensor.double() for tensor in make(SHAPES[2]))
    assert torch.equal(gated_residual(*double), reference_gated_residual(*double))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 1, 8)}, r"x: expected \[S,B,T,D\], got \[2,1,8\]"),
        ({"update": torch.zeros(2, 1, 7, 8)}, r"update: expected \[2,1,6,8\] to match x \[2,1,6,8\], got \[2,1,7,8\]"),
        ({"gate": torch.zeros(2, 1, 4, 8)}, r"x: expected \[S,B,T,D\] with T a multiple of the tables' 4 frames, got"),
        ({"gate": torch.zeros(2, 2, 2, 8)}, r"gate: expected \[2,1,2,8\] to match x"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    given = dict(zip(("x", "update", "gate"), make(Shape(2, 1, 2, 3, 8)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        gated_residual(**given)


def test_mixed_dtypes_are_refused() -> None:
    x, update, gate = make(Shape(2, 1, 2, 3, 8))
    with pytest.raises(TypeError, match=r"update: expected torch\.float32 to match x, got torch\.bfloat16"):
        gated_residual(x, update.bfloat16(), gate)
