"""gated_residual: what every op of a block has to pass, its definition, and what is special about a gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_ops import FrameOpTests, Given
from block_rows import KERNELS, SMALL, Shape, activations, device_of
from torch import Tensor

from u4d_fast.ops.gated_residual import gated_residual
from u4d_fast.reference.gated_residual import gated_residual as reference_gated_residual


class TestGatedResidual(FrameOpTests):
    name = "gated_residual"
    op = staticmethod(gated_residual)
    reference = staticmethod(reference_gated_residual)
    activations, tables = 2, 1

    def grad_arguments(self, given: Given) -> tuple[Any, ...]:
        return given

    def test_reference_is_the_definition(self) -> None:
        shape = Shape(2, 2, 3, 4, 10)
        x, update, gate = self.make(shape)
        found = reference_gated_residual(x, update, gate)
        for token in range(shape.frames * shape.patches):
            expected = x[:, :, token] + update[:, :, token] * gate[:, :, token // shape.patches]
            torch.testing.assert_close(found[:, :, token], expected)

    @pytest.mark.parametrize("backend", KERNELS)
    def test_the_gradient_of_x_is_not_copied(self, backend: str) -> None:
        leaves = [tensor.to(device_of(backend)).requires_grad_() for tensor in self.make(SMALL)]
        out = gated_residual(*leaves, backend=backend)
        weights = torch.randn_like(out)
        grad, *_ = torch.autograd.grad(out, leaves, weights)
        assert grad.data_ptr() == weights.data_ptr()

    @pytest.mark.parametrize("backend", ["reference", *KERNELS])
    def test_an_expanded_gate_gets_a_gradient_of_its_own_shape(self, backend: str) -> None:
        x, update = (tensor.to(device_of(backend)) for tensor in activations(Shape(2, 3, 4, 3, 16), torch.float32, 2))
        gate = torch.randn(2, 1, 1, 16).to(x).requires_grad_()
        (grad,) = torch.autograd.grad(gated_residual(x, update, gate.expand(2, 3, 4, 16), backend=backend).sum(), gate)
        torch.testing.assert_close(grad, update.sum((1, 2))[:, None, None])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(2, 1, 8)}, r"x: expected \[S,B,T,D\], got \[2,1,8\]"),
            (
                {"update": torch.zeros(2, 1, 7, 8)},
                r"update: expected \[2,1,6,8\] to match x \[2,1,6,8\], got \[2,1,7,8\]",
            ),
            (
                {"gate": torch.zeros(2, 1, 4, 8)},
                r"x: expected \[S,B,T,D\] with T a multiple of the tables' 4 frames, got",
            ),
            ({"gate": torch.zeros(2, 2, 2, 8)}, r"gate: expected \[2,1,2,8\] to match x"),
        ],
    )
    def test_bad_arguments(self, change: dict[str, Tensor], message: str) -> None:
        self.check_refused(change, message)

    def test_mixed_dtypes_are_refused(self) -> None:
        _, update, _ = self.make(SMALL, torch.bfloat16)
        wanted = r"update: expected torch\.float32 to match x, got torch\.bfloat16"
        self.check_refused({"update": update}, wanted, TypeError)
