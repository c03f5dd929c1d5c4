"""What every element-wise op of a block has to pass: `class TestX(BlockOpTests)` in the op's own file runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from block_rows import (
    DTYPES,
    EMPTY,
    IN_PARTS,
    KERNELS,
    LAYOUTS,
    ON_THE_SHIM,
    ORDERS,
    SHAPES,
    SMALL,
    WIDE,
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

HostShim = Callable[[str, str], AbstractContextManager[None]]
Given = tuple[Tensor, ...]


def as_tuple(outputs: Tensor | Given) -> Given:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def assert_same(found: Given, expected: Given) -> None:
    """The same bits."""
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class BlockOpTests:
    """What every op has to pass. A subclass in the op's own file says which op it is, and holds what is special."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    numbers: tuple[float, ...] = ()  # what both take after the tensors

    def make(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Given:
        """The op's tensors."""
        raise NotImplementedError

    def variants(self, shape: Shape, dtype: torch.dtype) -> list[Given]:
        """The op's tensors in all combinations of dtypes that its kernels take, for activations of this one."""
        return [self.make(shape, dtype)]

    def grad_arguments(self, given: Given) -> tuple[Any, ...]:
        """Arguments of the registered op `<name>_grad` where any activations will do."""
        raise NotImplementedError

    def run(self, given: Given, backend: str) -> Given:
        """The op on the device of its backend."""
        on_device = (tensor.to(device_of(backend)) for tensor in given)
        return as_tuple(self.op(*on_device, *self.numbers, backend=backend))

    def gradients(self, given: Given, backend: str) -> Given:
        """Gradients of all arguments, for gradients of all outputs that are the same numbers in every dtype."""
        leaves = [tensor.detach().to(device_of(backend)).requires_grad_() for tensor in given]
        outputs = as_tuple(self.op(*leaves, *self.numbers, backend=backend))
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outputs]
        return torch.autograd.grad(outputs, leaves, weights)

    def check(self, found: Given, given: Given) -> None:
        """The outputs by the rule."""
        plain = as_tuple(self.reference(*given, *self.numbers))
        exact = as_tuple(self.reference(*(tensor.double() for tensor in given), *self.numbers))
        for results in zip(found, plain, exact, strict=True):
            assert_no_worse(*results)

    def check_gradients(self, found: Given, given: Given) -> None:
        """The gradients by the rule; plain torch's are those of its own autograd."""
        exact = self.gradients(tuple(tensor.double() for tensor in given), "reference")
        for results in zip(found, self.gradients(given, "reference"), exact, strict=True):
            assert_no_worse(*results)

    def check_refused(self, change: dict[str, Tensor], message: str, error: type[Exception] = ValueError) -> None:
        """With one argument changed, the op tells what is wrong with it."""
        given = dict(zip(inspect.signature(self.op).parameters, self.make(SMALL), strict=False)) | change
        with pytest.raises(error, match=message):
            self.op(**given)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("backend", KERNELS)
    def test_kernel_is_no_worse_than_torch(self, backend: str, shape: Shape, dtype: torch.dtype) -> None:
        for given in self.variants(shape, dtype):
            self.check(self.run(given, backend), given)

    @pytest.mark.parametrize("shape", EMPTY)
    @pytest.mark.parametrize("backend", ["reference", *KERNELS])
    def test_nothing_gives_nothing(self, backend: str, shape: Shape) -> None:
        given = self.make(shape)
        assert {out.shape for out in self.run(given, backend)} == {given[0].shape}

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("backend", KERNELS)
    def test_every_element_is_written_and_the_same_each_time(self, backend: str, dtype: torch.dtype) -> None:
        for shape in (Shape(2, 2, 3, 5, 1536), Shape(3, 1, 2, 37, 77)):
            given = self.make(shape, dtype)
            for run in (self.run, self.gradients):
                with new_memory_is_nan():
                    first, second = run(given, backend), run(given, backend)
                assert all(out.isfinite().all() for out in first)
                assert_same(first, second)

    def test_threads_do_not_change_a_bit(self) -> None:
        given = self.make(Shape(2, 1, 3, 67, 333))
        threads, results = torch.get_num_threads(), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            try:
                results.append(self.run(given, "cpu") + self.gradients(given, "cpu"))
            finally:
                torch.set_num_threads(threads)
        assert_same(results[0], results[1])
        assert_same(results[0], results[2])

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cuda_source_on_the_host_shim(self, host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
        for given in (given for shape in ON_THE_SHIM for given in self.variants(shape, dtype)):
            with host_shim(self.name, order), new_memory_is_nan():
                found = self.run(given, "cpu")
            self.check(found, given)

    @pytest.mark.gpu
    def test_runs_on_the_callers_stream(self) -> None:
        given = tuple(tensor.to("cuda") for tensor in self.make(Shape(4, 1, 14, 30, 1536), torch.bfloat16))
        expected = self.run(given, "cuda") + self.gradients(given, "cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = self.run(given, "cuda") + self.gradients(given, "cuda")
        stream.synchronize()
        assert_same(found, expected)

    def test_gradients_by_gradcheck(self) -> None:
        given = [tensor.double().requires_grad_() for tensor in self.make(Shape(2, 1, 2, 3, 5))]
        assert torch.autograd.gradcheck(lambda *tensors: self.reference(*tensors, *self.numbers), given)
        # The registered op takes the reference for float64, and its own backward.
        registered = getattr(torch.ops.u4d_fast, self.name)
        assert torch.autograd.gradcheck(lambda *tensors: registered(*tensors, *self.numbers), given)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*SHAPES[1:5], SHAPES[6], *IN_PARTS, *EMPTY])
    @pytest.mark.parametrize("backend", KERNELS)
    def test_gradients_are_no_worse_than_torchs(self, backend: str, shape: Shape, dtype: torch.dtype) -> None:
        for given in self.variants(shape, dtype):
            self.check_gradients(self.gradients(given, backend), given)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cuda_backward_on_the_host_shim(self, host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
        for shape in [*SHAPES[:7], *IN_PARTS, *WIDE, *EMPTY]:
            given = self.make(shape, dtype)
            with host_shim(self.name, order), new_memory_is_nan():
                found = self.gradients(given, "cpu")
            self.check_gradients(found, given)

    def test_gradients_of_gradients_are_the_references(self) -> None:
        """A kernel's results are constants to torch: with create_graph it must not run."""
        results = []
        for backend in ("auto", "reference"):
            given = [tensor.requires_grad_() for tensor in self.make(SMALL)]
            squares = [out.square().sum() for out in as_tuple(self.op(*given, *self.numbers, backend=backend))]
            gradients = torch.autograd.grad(sum(squares), given, create_graph=True)
            results.append(torch.autograd.grad([gradient.square().sum() for gradient in gradients], given))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_registered_ops_keep_torchs_rules(self) -> None:
        given = self.make(SMALL, torch.bfloat16)
        registered, grad = (getattr(torch.ops.u4d_fast, self.name + suffix).default for suffix in ("", "_grad"))
        torch.library.opcheck(grad, self.grad_arguments(given))
        torch.library.opcheck(registered, (*(tensor.requires_grad_() for tensor in given), *self.numbers))

    def test_compiles_whole_with_gradients(self) -> None:
        given = [tensor.requires_grad_() for tensor in self.make(SMALL)]

        def length(*tensors: Tensor) -> Tensor:
            outputs = as_tuple(self.op(*tensors, *self.numbers))
            return torch.stack([out.cos() for out in outputs]).prod(0).sum()

        eager = torch.autograd.grad(length(*given), given)
        compiled = torch.autograd.grad(torch.compile(length, fullgraph=True, backend="aot_eager")(*given), given)
        for found, expected in zip(compiled, eager, strict=True):
            torch.testing.assert_close(found, expected)


class FrameOpTests(BlockOpTests):
    """For ops of activations beside tables with a row per latent frame."""

    activations: int
    tables: int

    def make(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Given:
        return (*activations(shape, dtype, self.activations), *tables(shape, self.tables))

    def laid_out(self, layout: str, backend: str) -> tuple[Given, Given]:
        """Activations whose channels are not dense and tables in another layout, and the same numbers in dense ones."""
        made = [tensor.to(device_of(backend)) for tensor in self.make(Shape(2, 3, 4, 3, 72), torch.bfloat16)]
        rows, dense = made[: self.activations], made[self.activations :]
        elsewhere = [tensor.mT.contiguous().mT for tensor in rows] + [lay_out(table, layout) for table in dense]
        assert not any(tensor.is_contiguous() for tensor in elsewhere)
        return tuple(elsewhere), tuple(tensor.contiguous() for tensor in elsewhere)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("backend", ["reference", *KERNELS])
    def test_any_layout_gives_the_same_bits(self, backend: str, layout: str) -> None:
        elsewhere, dense = self.laid_out(layout, backend)
        assert_same(self.run(elsewhere, backend), self.run(dense, backend))
        if backend != "reference":
            assert_same(self.gradients(elsewhere, backend), self.gradients(dense, backend))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_cuda_source_reads_tables_where_they_lie(self, host_shim: HostShim, layout: str) -> None:
        elsewhere, dense = self.laid_out(layout, "cpu")
        with host_shim(self.name, "forward"):
            assert_same(self.run(elsewhere, "cpu"), self.run(dense, "cpu"))
            assert_same(self.gradients(elsewhere, "cpu"), self.gradients(dense, "cpu"))

    def test_double_and_very_wide_rows_take_the_reference(self) -> None:
        wide = self.make(Shape(1, 1, 1, 2, 8200))
        for given in (wide, tuple(tensor.double() for tensor in self.make(SHAPES[2]))):
            found = as_tuple(self.op(*given, *self.numbers))
            assert_same(found, as_tuple(self.reference(*given, *self.numbers)))
        with pytest.raises(BackendError, match=f"{self.name}: backend 'cpu' cannot run: the kernels take at most 8192"):
            self.op(*wide, *self.numbers, backend="cpu")

    def test_half_tables_are_read_as_they_are(self) -> None:
        made = self.make(SHAPES[2], torch.bfloat16)
        halves = tuple(tensor.bfloat16() for tensor in made)
        wide = (*made[: self.activations], *(table.float() for table in halves[self.activations :]))
        assert_same(self.run(halves, "cpu"), self.run(wide, "cpu"))
        found = self.gradients(halves, "cpu")
        assert_same(found, tuple(grad.bfloat16() for grad in self.gradients(wide, "cpu")))
