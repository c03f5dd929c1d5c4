"""gated_residual_norm: what every op of a block has to pass, and that it is the two ops it joins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_ops import FrameOpTests, Given, HostShim, assert_same
from block_rows import DTYPES, KERNELS, ORDERS, SHAPES, Shape, assert_no_worse, device_of
from torch import Tensor

from u4d_fast.ops.ada_layer_norm import ada_layer_norm
from u4d_fast.ops.gated_residual import gated_residual
from u4d_fast.ops.gated_residual_norm import gated_residual_norm
from u4d_fast.reference.gated_residual_norm import gated_residual_norm as reference_gated_residual_norm

EPS = 1e-6


def both_ops(given: Given, backend: str) -> Given:
    x, update, gate, shift, scale = given
    x_new = gated_residual(x, update, gate, backend=backend)
    return x_new, ada_layer_norm(x_new, shift, scale, EPS, backend=backend)


class TestGatedResidualNorm(FrameOpTests):
    name = "gated_residual_norm"
    op = staticmethod(gated_residual_norm)
    reference = staticmethod(reference_gated_residual_norm)
    numbers = (EPS,)
    activations, tables = 2, 3

    def grad_arguments(self, given: Given) -> tuple[Any, ...]:
        x, update, gate, _, scale = given
        return x, update, x, update, gate, scale, EPS

    def check(self, found: Given, given: Given) -> None:
        """The norm is held to the truth of x_new as it was rounded, which is its definition."""
        x_new, normed = found
        exact, _ = reference_gated_residual_norm(*(tensor.double() for tensor in given), EPS)
        assert_no_worse(x_new, gated_residual(*given[:3], backend="reference"), exact)
        shift, scale = given[3:]
        plain = ada_layer_norm(x_new.cpu(), shift, scale, EPS, backend="reference")
        truth = ada_layer_norm(x_new.cpu().double(), shift.double(), scale.double(), EPS, backend="reference")
        assert_no_worse(normed, plain, truth)

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("backend", ["reference", *KERNELS])
    def test_it_is_the_two_ops_one_after_the_other(self, backend: str, dtype: torch.dtype) -> None:
        if dtype == torch.float64 and backend != "reference":
            return
        for shape in SHAPES[1:]:
            given = self.make(shape, dtype)
            on_device = tuple(tensor.to(device_of(backend)) for tensor in given)
            assert_same(self.run(given, backend), both_ops(on_device, backend))

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("backend", KERNELS)
    def test_one_output_alone_has_gradients(self, backend: str, which: int) -> None:
        check_one_output(self.make(Shape(2, 1, 2, 3, 8)), which, backend)

    @pytest.mark.parametrize("order", ORDERS)
    def test_cuda_backward_of_the_norm_alone(self, host_shim: HostShim, order: str) -> None:
        for shape in (Shape(2, 1, 2, 3, 8), Shape(1, 1, 1, 2, 5120), Shape(1, 1, 2, 35, 7)):
            with host_shim(self.name, order):
                check_one_output(self.make(shape), 1, "cpu")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"update": torch.zeros(2, 1, 7, 8)},
                r"update: expected \[2,1,6,8\] to match x \[2,1,6,8\], got \[2,1,7,8\]",
            ),
            (
                {"gate": torch.zeros(2, 1, 3, 8)},
                r"shift: expected \[2,1,3,8\] to match x \[2,1,6,8\], got \[2,1,2,8\]",
            ),
            ({"scale": torch.zeros(2, 1, 2, 1)}, r"scale: expected \[2,1,2,8\] to match x"),
        ],
    )
    def test_bad_arguments(self, change: dict[str, Tensor], message: str) -> None:
        self.check_refused(change, message)


def check_one_output(given: Given, which: int, backend: str) -> None:
    """Gradients of one output, the other being unused: those of plain torch, and None where it has None."""
    found, plain = [], []
    for gradients, name in ((found, backend), (plain, "reference")):
        leaves = [tensor.detach().to(device_of(backend)).requires_grad_() for tensor in given]
        out = gated_residual_norm(*leaves, EPS, backend=name)[which]
        gradients += torch.autograd.grad(out.cos().sum(), leaves, allow_unused=True)
    for one, other in zip(found, plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
