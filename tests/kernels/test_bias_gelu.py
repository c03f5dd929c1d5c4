"""bias_gelu: what every op of a block has to pass, its definition, its tails, and writing in place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from block_ops import BlockOpTests, Given, HostShim
from block_rows import DTYPES, KERNELS, ORDERS, Shape, device_of, new_memory_is_nan
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.ops.bias_gelu import bias_gelu
from u4d_fast.reference.bias_gelu import bias_gelu as reference_bias_gelu

# Other numbers of dimensions, the hidden layer of wan-1.3b, nothing.
SHAPES = [(1, 1, 1), (2, 3, 7), (4, 2, 5, 48), (3, 9, 250), (2, 2, 2, 3, 264), (1, 3, 8960)]
EMPTY = [(2, 0, 8), (0, 3, 8), (2, 3, 0)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, bias_dtype: torch.dtype | None = None) -> Given:
    """Values that reach both tails of GELU, and a bias in x's dtype."""
    generator = torch.Generator().manual_seed(0)
    x = 3.0 * torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], shape[-1], generator=generator)
    return x.to(dtype), bias.to(bias_dtype or dtype)


class TestBiasGelu(BlockOpTests):
    name = "bias_gelu"
    op = staticmethod(bias_gelu)
    reference = staticmethod(reference_bias_gelu)

    def make(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Given:
        return make((shape.streams, shape.batch, shape.frames * shape.patches, shape.width), dtype)

    def variants(self, shape: Shape, dtype: torch.dtype) -> list[Given]:
        x, bias = self.make(shape, dtype)
        return [(x, bias.to(bias_dtype)) for bias_dtype in {dtype, torch.float32}]

    def grad_arguments(self, given: Given) -> tuple[Any, ...]:
        x, bias = given
        return x, x, bias

    def test_reference_is_the_definition(self) -> None:
        x, bias = make((2, 3, 4, 7), torch.float64)
        v = x + bias[:, None, None]
        expected = 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        torch.testing.assert_close(reference_bias_gelu(x, bias), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
    @pytest.mark.parametrize("backend", KERNELS)
    def test_any_number_of_dimensions(self, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        for bias_dtype in {dtype, torch.float32}:
            given = make(shape, dtype, bias_dtype)
            (found,) = self.run(given, backend)
            assert found.shape == shape and found.is_contiguous()
            self.check((found,), given)
            self.check_gradients(self.gradients(given, backend), given)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cuda_source_in_any_number_of_dimensions(self, host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
        for shape in [*SHAPES, *EMPTY]:
            for bias_dtype in {dtype, torch.float32}:
                given = make(shape, dtype, bias_dtype)
                with host_shim(self.name, order), new_memory_is_nan():
                    found, gradients = self.run(given, "cpu"), self.gradients(given, "cpu")
                    in_place = bias_gelu(given[0].clone(), given[1], inplace=True, backend="cpu")
                assert torch.equal(in_place, found[0])
                self.check(found, given)
                self.check_gradients(gradients, given)

    @pytest.mark.parametrize("backend", ["reference", *KERNELS])
    def test_strided_inputs(self, backend: str) -> None:
        x, bias = (tensor.to(device_of(backend)) for tensor in make((3, 5, 48), torch.bfloat16))
        expected = bias_gelu(x, bias, backend=backend)
        assert torch.equal(bias_gelu(x.mT.contiguous().mT, bias.mT.contiguous().mT, backend=backend), expected)
        wide = torch.cat((x, x), -1)[..., :48]
        assert torch.equal(bias_gelu(wide, bias[:1].expand(3, 48), backend=backend)[0], expected[0])


# Tails.


def tails() -> tuple[Tensor, Tensor]:
    """Every size of number, and the values that are none."""
    magnitudes = torch.logspace(-40, 38, 400, dtype=torch.float64).float()
    line = torch.linspace(-30, 30, 4001)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    x = torch.cat((magnitudes, -magnitudes, line, special))[None, None]
    return x, torch.zeros(1, x.shape[-1])


def check_tails(found: Tensor) -> None:
    x, bias = tails()
    exact = reference_bias_gelu(x.double(), bias.double())
    plain = reference_bias_gelu(x, bias)
    finite = x.isfinite()
    assert torch.equal(found[finite].isfinite(), plain[finite].isfinite())
    # An absolute error of a step of the argument at most: plain torch has up to 0.7 of it where GELU's values vanish.
    assert ((found - exact).abs() <= 2.0**-22 * x.double().abs().clamp(max=1e37) + 1e-37)[finite].all()
    assert found[0, 0, -4].isnan() and found[0, 0, -3] == torch.inf and found[0, 0, -1] == 0
    assert found[0, 0, -2].isnan() == plain[0, 0, -2].isnan()


def slope_of_tails(backend: str) -> Tensor:
    x, bias = (tensor.to(device_of(backend)) for tensor in tails())
    (slope,) = torch.autograd.grad(bias_gelu(x.requires_grad_(), bias, backend=backend).sum(), x)
    return slope.cpu()


def check_slope_of_tails(slope: Tensor) -> None:
    """It goes to 0 and to 1 and stays there, and is NaN where x is."""
    x, bias = (tensor.double() for tensor in tails())
    (exact,) = torch.autograd.grad(reference_bias_gelu(x.requires_grad_(), bias).sum(), x)
    bends = x.abs() < 1e6  # further out plain torch multiplies 0 by infinity
    assert ((slope - exact).abs() <= 1e-6)[bends].all()
    assert ((slope - (x > 0).float()).abs() <= 1e-30)[~bends & ~x.isnan()].all()
    assert slope[x.isnan()].isnan().all()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_tails_and_values_that_are_not_finite(backend: str) -> None:
    check_tails(bias_gelu(*(tensor.to(device_of(backend)) for tensor in tails()), backend=backend).cpu())


@pytest.mark.parametrize("backend", KERNELS)
def test_slope_of_tails(backend: str) -> None:
    check_slope_of_tails(slope_of_tails(backend))


def test_cuda_source_has_right_tails(host_shim: HostShim) -> None:
    with host_shim("bias_gelu", "forward"):
        found, slope = bias_gelu(*tails(), backend="cpu"), slope_of_tails("cpu")
    check_tails(found)
    check_slope_of_tails(slope)


# In place.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_in_place_gives_the_same_bits_in_the_same_memory(backend: str, dtype: torch.dtype) -> None:
    x, bias = (tensor.to(device_of(backend)) for tensor in make((2, 3, 5, 48), dtype))
    expected = bias_gelu(x, bias, backend=backend)
    held = x.clone()
    found = bias_gelu(held, bias, inplace=True, backend=backend)
    assert found is held and torch.equal(found, expected)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert bias_gelu(strided, bias, inplace=True, backend=backend) is strided and torch.equal(strided, expected)


def test_in_place_is_refused_where_a_gradient_is_wanted() -> None:
    x, bias = make((2, 3, 8))
    bias.requires_grad_()
    with pytest.raises(ValueError, match="inplace: expected no wanted gradient"):
        bias_gelu(x, bias, inplace=True)
    with torch.no_grad():
        bias_gelu(x, bias, inplace=True)


def test_in_place_is_noticed_by_a_graph_that_saved_x() -> None:
    x, bias = make((2, 3, 8))
    weight = torch.ones(8, requires_grad=True)
    product = (x * weight).sum()
    with torch.no_grad():
        bias_gelu(x, bias, inplace=True, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_opcheck_in_place() -> None:
    torch.library.opcheck(torch.ops.u4d_fast.bias_gelu_inplace.default, make((2, 3, 8), torch.bfloat16))


def test_compiles_in_place_and_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def activated(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(x + 1, bias, inplace=True) * 2

    x, bias = make((2, 3, 8))
    expected = 2 * bias_gelu(x + 1, bias)
    called: list[str] = []
    original = backends.call
    monkeypatch.setattr(backends, "call", lambda op, *rest: (called.append(op), original(op, *rest)))
    found = torch.compile(activated, fullgraph=True, backend="aot_eager")(x, bias)
    assert called == ["bias_gelu"]
    torch.testing.assert_close(found, expected)


# Arguments.


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 8), r"x: expected \[S,...,D\] with at least three dimensions, got \[2,8\]"),
        (torch.zeros(2, 3, 8), torch.zeros(8), r"bias: expected \[S,D\], got \[8\]"),
        (torch.zeros(2, 3, 8), torch.zeros(3, 8), r"bias: expected \[2,8\] to match x \[2,3,8\], got \[3,8\]"),
    ],
)
def test_bad_arguments(x: Tensor, bias: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_gelu(x, bias)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x: expected a floating dtype, got torch\.int64"):
        bias_gelu(torch.zeros(2, 3, 8).long(), torch.zeros(2, 8))
