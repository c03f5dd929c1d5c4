"""ada_layer_norm: what every op of a block has to pass, its definition, and what is special about a norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_ops import FrameOpTests, Given
from block_rows import KERNELS, SMALL, Shape, activations, assert_no_worse, device_of
from torch import Tensor

from u4d_fast.ops.ada_layer_norm import ada_layer_norm
from u4d_fast.reference.ada_layer_norm import ada_layer_norm as reference_ada_layer_norm

EPS = 1e-6


class TestAdaLayerNorm(FrameOpTests):
    name = "ada_layer_norm"
    op = staticmethod(ada_layer_norm)
    reference = staticmethod(reference_ada_layer_norm)
    numbers = (EPS,)
    activations, tables = 1, 2

    def grad_arguments(self, given: Given) -> tuple[Any, ...]:
        x, _, scale = given
        return x, x, scale, EPS

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_reference_is_the_definition(self, dtype: torch.dtype) -> None:
        shape = Shape(2, 2, 3, 4, 10)
        x, shift, scale = (tensor.to(dtype) for tensor in self.make(shape))
        found = reference_ada_layer_norm(x, shift, scale, EPS)
        for token in range(shape.frames * shape.patches):
            row, frame = x[:, :, token], token // shape.patches
            deviation = (row.var(-1, correction=0, keepdim=True) + EPS).sqrt()
            expected = (row - row.mean(-1, keepdim=True)) / deviation * (1 + scale[:, :, frame]) + shift[:, :, frame]
            torch.testing.assert_close(found[:, :, token], expected)

    @pytest.mark.parametrize("backend", KERNELS)
    def test_a_mean_far_from_zero_costs_no_digits(self, backend: str) -> None:
        x, shift, scale = self.make(Shape(1, 1, 2, 4, 1536))
        given = (x + 1000.0, shift, scale)
        (found,), exact = self.run(given, backend), reference_ada_layer_norm(*(part.double() for part in given))
        # Over all rows: in one, the mean's rounding decides.
        assert_no_worse(found.flatten(), reference_ada_layer_norm(*given).flatten(), exact.flatten())

    @pytest.mark.parametrize("backend", ["reference", *KERNELS])
    def test_nan_stays_in_its_row(self, backend: str) -> None:
        x, shift, scale = self.make(Shape(1, 2, 2, 3, 40))
        x[0, 1, 2, 5] = torch.nan
        found = self.run((x, shift, scale), backend)[0].isnan()
        assert found[0, 1, 2].all() and found.sum() == 40

    @pytest.mark.parametrize("backend", ["reference", *KERNELS])
    def test_an_expanded_table_gets_a_gradient_of_its_own_shape(self, backend: str) -> None:
        (x,) = activations(Shape(2, 3, 4, 3, 16), torch.float32, 1)
        x = x.to(device_of(backend))
        six = torch.randn(2, 1, 4, 6, 16).to(x).requires_grad_()
        out = ada_layer_norm(x, *six.expand(2, 3, 4, 6, 16).unbind(-2)[:2], backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), six)
        assert grad.shape == six.shape
        torch.testing.assert_close(grad[:, :, :, 0], torch.full((2, 1, 4, 16), 9.0).to(grad))
        assert not grad[..., 2:, :].any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(2, 1, 8)}, r"x: expected \[S,B,T,D\], got \[2,1,8\]"),
            ({"x": torch.zeros(2, 1, 7, 8)}, r"x: expected \[S,B,T,D\] with T a multiple of the tables' 2 frames, got"),
            ({"x": torch.zeros(2, 1, 6, 0)}, r"x: expected \[S,B,T,D\] with at least one channel"),
            (
                {"scale": torch.zeros(2, 1, 3, 8)},
                r"scale: expected \[2,1,2,8\] to match x \[2,1,6,8\], got \[2,1,3,8\]",
            ),
            ({"shift": torch.zeros(2, 1, 2, 9)}, r"shift: expected \[2,1,2,8\] to match x"),
        ],
    )
    def test_bad_arguments(self, change: dict[str, Tensor], message: str) -> None:
        self.check_refused(change, message)

    def test_integers_are_refused(self) -> None:
        x, shift, _ = (tensor.long() for tensor in self.make(SMALL))
        wanted = r"x: expected float32, float64, bfloat16 or float16, got torch\.int64"
        self.check_refused({"x": x}, wanted, TypeError)
        self.check_refused({"shift": shift}, r"shift: expected a floating dtype, got torch\.int64", TypeError)
