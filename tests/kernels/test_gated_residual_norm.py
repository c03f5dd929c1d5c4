"""gated_residual_norm against the two ops it joins, its kernels against float64, and its gradients."""

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

from u4d_fast.ops.ada_layer_norm import ada_layer_norm
from u4d_fast.ops.gated_residual import gated_residual
from u4d_fast.ops.gated_residual_norm import gated_residual_norm
from u4d_fast.reference.gated_residual_norm import gated_residual_norm as reference_gated_residual_norm

HostShim = Callable[[str, str], AbstractContextManager[None]]
EPS = 1e-6


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (*activations(shape, dtype, 2), *tables(shape, 3))


def run(given: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor]:
    """The op on the device of its backend."""
    return gated_residual_norm(*(tensor.to(device_of(backend)) for tensor in given), eps=EPS, backend=backend)


def check_against_torch(found: tuple[Tensor, Tensor], given: tuple[Tensor, ...]) -> None:
    """Both outputs by the rule; the norm is held to the truth of x_new as it was rounded, which is its definition."""
    x_new, normed = found
    exact, _ = reference_gated_residual_norm(*(tensor.double() for tensor in given), EPS)
    assert_no_worse(x_new, gated_residual(*given[:3], backend="reference"), exact)
    shift, scale = given[3:]
    plain = ada_layer_norm(x_new.cpu(), shift, scale, EPS, backend="reference")
    truth = ada_layer_norm(x_new.cpu().double(), shift.double(), scale.double(), EPS, backend="reference")
    assert_no_worse(normed, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    given = make(shape, dtype)
    check_against_torch(run(given, backend), given)


def both_ops(given: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor]:
    x, update, gate, shift, scale = (tensor.to(device_of(backend)) for tensor in given)
    x_new = gated_residual(x, update, gate, backend=backend)
    return x_new, ada_layer_norm(x_new, shift, scale, EPS, backend=backend)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_it_is_the_two_ops_one_after_the_other(backend: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[1:]:
        given = make(shape, dtype)
        if dtype == torch.float64 and backend != "reference":
            continue
        for one, other in zip(run(given, backend), both_ops(given, backend), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_any_layout_gives_the_same_bits(backend: str, layout: str) -> None:
    x, update, *dense = (tensor.to(device_of(backend)) for tensor in make(Shape(2, 3, 4, 3, 72), torch.bfloat16))
    laid_out = [lay_out(table, layout) for table in dense]
    strided = [tensor.mT.contiguous().mT for tensor in (x, update)]
    assert not strided[0].is_contiguous() and not any(table.is_contiguous() for table in laid_out)
    expected = gated_residual_norm(x, update, *(table.contiguous() for table in laid_out), backend=backend)
    for one, other in zip(gated_residual_norm(*strided, *laid_out, backend=backend), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nothing_gives_nothing(backend: str, shape: Shape) -> None:
    given = make(shape)
    assert [out.shape for out in run(given, backend)] == [given[0].shape] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str, dtype: torch.dtype) -> None:
    for shape in (Shape(2, 2, 3, 5, 1536), Shape(3, 1, 2, 7, 77)):
        given = make(shape, dtype)
        with new_memory_is_nan():
            first, second = run(given, backend), run(given, backend)
        for one, other in zip(first, second, strict=True):
            assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [Shape(1, 1, 1, 1, 1), Shape(2, 2, 3, 3, 64), Shape(2, 1, 2, 2, 77), *SHAPES[-5:], *EMPTY]:
        given = make(shape, dtype)
        with host_shim("gated_residual_norm", order), new_memory_is_nan():
            found = run(given, "cpu")
        check_against_torch(found, given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_source_reads_tables_where_they_lie(host_shim: HostShim, layout: str) -> None:
    x, update, *dense = make(Shape(2, 3, 4, 3, 72), torch.bfloat16)
    laid_out = [lay_out(table, layout) for table in dense]
    with host_shim("gated_residual_norm", "forward"):
        expected = gated_residual_norm(x, update, *(table.contiguous() for table in laid_out), backend="cpu")
        found = gated_residual_norm(x, update, *laid_out, backend="cpu")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    given = [tensor.to("cuda") for tensor in make(Shape(4, 1, 14, 30, 1536), torch.bfloat16)]
    expected = gated_residual_norm(*given, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = gated_residual_norm(*given, backend="cuda")
    stream.synchronize()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# Gradients.


def test_gradients_by_gradcheck() -> None:
    given = [tensor.double().requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 5))]
    assert torch.autograd.gradcheck(lambda *a: reference_gated_residual_norm(*a, EPS), given)
    # The registered op takes the reference for float64, and its own backward.
    assert torch.autograd.gradcheck(lambda *a: torch.ops.u4d_fast.gated_residual_norm(*a, EPS), given)


def gradients(given: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    leaves = [tensor.to(device_of(backend)).requires_grad_() for tensor in given]
    outputs = gated_residual_norm(*leaves, eps=EPS, backend=backend)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(out.shape, generator=generator).to(given[0].dtype).to(out) for out in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[1:5], SHAPES[6], *EMPTY])
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_are_no_worse_than_torchs(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    given = make(shape, dtype)
    exact = gradients(tuple(tensor.double() for tensor in given), "reference")
    plain, fast = gradients(given, "reference"), gradients(given, backend)
    for found, torchs, truth in zip(fast, plain, exact, strict=True):
        assert_no_worse(found, torchs, truth)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone_has_gradients(which: int) -> None:
    given = make(Shape(2, 1, 2, 3, 8))
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    found = torch.autograd.grad(gated_residual_norm(*leaves)[which].cos().sum(), leaves, allow_unused=True)
    plain = gated_residual_norm(*leaves, backend="reference")[which].cos().sum()
    for one, other in zip(found, torch.autograd.grad(plain, leaves, allow_unused=True), strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    given = [tensor.requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 8), torch.bfloat16)]
    torch.library.opcheck(torch.ops.u4d_fast.gated_residual_norm.default, (*given, EPS))


def test_compiles_whole_with_gradients() -> None:
    given = [tensor.requires_grad_() for tensor in make(Shape(2, 1, 2, 3, 8))]

    def length(*tensors: Tensor) -> Tensor:
        x_new, normed = gated_residual_norm(*tensors)
        return (x_new.cos() * normed).sum()

    eager = torch.autograd.grad(length(*given), given)
    compiled = torch.autograd.grad(torch.compile(length, fullgraph=True, backend="aot_eager")(*given), given)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": torch.zeros(2, 1, 7, 8)}, r"update: expected \[2,1,6,8\] to match x \[2,1,6,8\], got \[2,1,7,8\]"),
        ({"gate": torch.zeros(2, 1, 3, 8)}, r"shift: expected \[2,1,3,8\] to match x \[2,1,6,8\], got \[2,1,2,8\]"),
        ({"scale": torch.zeros(2, 1, 2, 1)}, r"scale: expected \[2,1,2,8\] to match x"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    names = ("x", "update", "gate", "shift", "scale")
    given = dict(zip(names, make(Shape(2, 1, 2, 3, 8)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        gated_residual_norm(**given)
