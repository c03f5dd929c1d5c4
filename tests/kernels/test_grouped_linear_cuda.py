"""The grouped linear kernels on a Hopper GPU against float64, with torch's products as the measure of error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_layers import Shape, check, check_fp8, make, make_fp8
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.fp8 import Fp8Rows
from u4d_fast.ops.grouped_linear import grouped_linear, grouped_linear_fp8
from u4d_fast.scaled_mm import scaled_mm_by_stream, takes_scaled_mm

pytestmark = pytest.mark.gpu

SHAPES = [
    Shape(1, 1, 8, 16),
    Shape(2, 5, 40, 48),
    Shape(1, 128, 256, 64),
    Shape(1, 128, 192, 128),
    Shape(2, 129, 264, 208),
    Shape(3, 63, 1000, 1552),
    Shape(4, 301, 136, 272),  # as the tiny preset's, and no multiple of a tile
    Shape(4, 2100, 1544, 336),  # several tiles for each block, two panels, not alike
]
WIDTH, HIDDEN = 1536, 8960
LAYERS = [(WIDTH, WIDTH), (3 * WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)]  # columns, depth: wan-1.3b's
TOKENS = 4200  # of a stream


@pytest.fixture(autouse=True)
def _needs_the_kernels() -> None:
    for op in ("grouped_linear", "grouped_linear_fp8"):
        if reason := backends.unavailable(op, "cuda", torch.cuda.current_device()):
            pytest.skip(reason)


@pytest.fixture
def outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does not write stays NaN."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return new_empty(self, *args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(Tensor, "new_empty", filled)


def half(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias in bfloat16."""
    return make(Shape(*shape), device="cuda")


def eighth(*shape: int) -> tuple[Fp8Rows, Fp8Rows, Tensor]:
    """x, weight and bias, the first two in e4m3."""
    return make_fp8(Shape(*shape), device="cuda")


# Values.


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_any_size(shape: Shape, gelu: bool) -> None:
    x, weight, bias = half(*shape)
    rows, weights, _ = eighth(*shape)
    for one in (bias, bias.float(), None):
        check(grouped_linear(x, weight, one, gelu=gelu, backend="cuda"), x, weight, one, gelu)
        check_fp8(grouped_linear_fp8(rows, weights, one, gelu=gelu, backend="cuda"), rows, weights, one, gelu)


@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize(("columns", "depth"), LAYERS)
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_every_layer_of_wan(columns: int, depth: int, clips: int) -> None:
    x, weight, bias = half(4, clips * TOKENS, columns, depth)
    check(grouped_linear(x, weight, bias, backend="cuda"), x, weight, bias, False)


@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize(("columns", "depth"), LAYERS)
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_every_layer_of_wan_in_fp8(columns: int, depth: int, clips: int) -> None:
    x, weight, bias = eighth(4, clips * TOKENS, columns, depth)
    check_fp8(grouped_linear_fp8(x, weight, bias, backend="cuda"), x, weight, bias, False)


def test_fp8_sums_do_not_drift_over_many_channels() -> None:
    """All products positive, and K = 8960: the sum grows far beyond what 14 bits hold beside a product."""
    rows, weights, _ = eighth(1, 128, 192, HIDDEN)
    x, weight = (Fp8Rows(given.values.float().abs().to(given.values.dtype), given.scale) for given in (rows, weights))
    found = grouped_linear_fp8(x, weight, backend="cuda").double()
    exact = x.dequantize().double() @ weight.dequantize().double().mT
    assert (found / exact - 1).abs().max() < 2.0**-6


@pytest.mark.parametrize("size", [16, HIDDEN])
def test_torchs_scaled_product_is_what_auto_takes(size: int) -> None:
    x, weight, bias = eighth(2, 70, 48, size)
    assert takes_scaled_mm(x, weight, torch.bfloat16)
    found = grouped_linear_fp8(x, weight, bias, gelu=True)
    assert torch.equal(found, scaled_mm_by_stream(x, weight, bias, True))
    torch.testing.assert_close(
        found, grouped_linear_fp8(x, weight, bias, gelu=True, backend="cuda"), rtol=0.02, atol=0.02
    )


# How it is called.


def every_kernel(x: Tensor, weight: Tensor, rows: Fp8Rows, weights: Fp8Rows, bias: Tensor) -> tuple[Tensor, Tensor]:
    return (
        grouped_linear(x, weight, bias, gelu=True, backend="cuda"),
        grouped_linear_fp8(rows, weights, bias, gelu=True, backend="cuda"),
    )


def given_for_every_kernel(shape: Shape) -> list[Any]:
    x, weight, bias = half(*shape)
    rows, weights, _ = eighth(*shape)
    return [x, weight, rows, weights, bias]


def test_the_same_call_gives_the_same_bits() -> None:
    given = given_for_every_kernel(Shape(4, 1000, 1536, 1536))
    expected = every_kernel(*given)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(every_kernel(*given), expected, strict=True))


def test_runs_on_the_current_stream() -> None:
    given = given_for_every_kernel(Shape(4, 1000, 1536, 1536))
    expected = every_kernel(*given)
    x = torch.zeros_like(given[0])
    values = torch.zeros_like(given[2].values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream reads zeros
        x.copy_(given[0])
        values.copy_(given[2].values)
        found = every_kernel(x, given[1], Fp8Rows(values, given[2].scale), *given[3:])
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_captured_graph_follows_its_inputs() -> None:
    given = given_for_every_kernel(Shape(2, 300, 520, 1536))
    every_kernel(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = every_kernel(*given)
    given[0].mul_(2)
    given[2].scale.mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, every_kernel(*given), strict=True))


def test_strided_inputs() -> None:
    x, weight, bias = half(2, 300, 264, 336)
    expected = grouped_linear(x, weight, bias, backend="cuda")
    side_by_side = torch.stack(x.unbind(0), 1).transpose(0, 1)
    apart = weight.mT.contiguous().mT  # can't be read in place
    odd_address = x.new_zeros(x.numel() + 1)[1:].view_as(x).copy_(x)
    for strided in (
        (side_by_side, weight),
        (x, apart),
        (odd_address, weight),
        (x, torch.cat((weight,) * 2, 1)[:, :264]),
    ):
        assert torch.equal(grouped_linear(*strided, bias, backend="cuda"), expected)
    in_clips = x.unflatten(1, (3, 100))
    assert torch.equal(grouped_linear(in_clips, weight, bias, backend="cuda"), expected.unflatten(1, (3, 100)))


def test_what_is_refused() -> None:
    x, weight, _ = half(1, 4, 12, 16)
    with pytest.raises(backends.BackendError, match="the kernel takes N a multiple of 8"):
        grouped_linear(x, weight, backend="cuda")
    with pytest.raises(backends.BackendError, match="the kernel takes bfloat16"):
        grouped_linear(x.float(), weight.float(), backend="cuda")


@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_are_near_torchs(gelu: bool) -> None:
    leaves = [tensor.requires_grad_() for tensor in half(2, 300, 264, 336)]
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
    results = {}
    for name, given in (("cuda", leaves), ("reference", leaves), ("exact", exact_leaves)):
        out = grouped_linear(*given, gelu=gelu, backend="reference" if name == "exact" else name)
        results[name] = torch.autograd.grad(out.float().cos().sum() if name != "exact" else out.cos().sum(), given)
    for found, plain, exact in zip(results["cuda"], results["reference"], results["exact"], strict=True):
        assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-3 * exact.norm()


def test_compiles_whole() -> None:
    given = given_for_every_kernel(Shape(2, 70, 72, 80))
    compiled = torch.compile(every_kernel, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*given), every_kernel(*given), strict=True))
