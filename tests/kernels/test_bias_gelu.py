"""bias_gelu against its definition, its kernels against float64, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from block_rows import DTYPES, KERNELS, ORDERS, assert_no_worse, device_of, new_memory_is_nan
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.ops.bias_gelu import bias_gelu
from u4d_fast.reference.bias_gelu import bias_gelu as reference_bias_gelu

HostShim = Callable[[str, str], AbstractContextManager[None]]
SHAPES = [(1, 1, 1), (2, 3, 7), (4, 2, 5, 48), (3, 9, 250), (2, 2, 2, 3, 264), (1, 3, 8960)]
EMPTY = [(2, 0, 8), (0, 3, 8), (2, 3, 0)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, bias_dtype: torch.dtype | None = None):
    """Values that reach both tails of GELU, and a bias in x's dtype."""
    generator = torch.Generator().manual_seed(0)
    x = 3.0 * torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], shape[-1], generator=generator)
    return x.to(dtype), bias.to(bias_dtype or dtype)


def run(x: Tensor, bias: Tensor, backend: str, inplace: bool = False) -> Tensor:
    """The op on the device of its backend."""
    x, bias = x.to(device_of(backend)), bias.to(device_of(backend))
    return bias_gelu(x.clone() if inplace else x, bias, inplace=inplace, backend=backend)


def check_against_torch(found: Tensor, x: Tensor, bias: Tensor) -> None:
    assert_no_worse(found, reference_bias_gelu(x, bias), reference_bias_gelu(x.double(), bias.double()))


def test_reference_is_the_definition() -> None:
    x, bias = make((2, 3, 4, 7), torch.float64)
    v = x + bias[:, None, None]
    expected = 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    torch.testing.assert_close(reference_bias_gelu(x, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for bias_dtype in {dtype, torch.float32}:
        x, bias = make(shape, dtype, bias_dtype)
        check_against_torch(run(x, bias, backend), x, bias)


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


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_tails_and_values_that_are_not_finite(backend: str) -> None:
    check_tails(run(*tails(), backend).cpu())


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


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_strided_inputs(backend: str) -> None:
    x, bias = (tensor.to(device_of(backend)) for tensor in make((3, 5, 48), torch.bfloat16))
    expected = bias_gelu(x, bias, backend=backend)
    assert torch.equal(bias_gelu(x.mT.contiguous().mT, bias.mT.contiguous().mT, backend=backend), expected)
    wide = torch.cat((x, x), -1)[..., :48]
    assert torch.equal(bias_gelu(wide, bias[:1].expand(3, 48), backend=backend)[0], expected[0])


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nothing_gives_nothing(backend: str, shape: tuple[int, ...]) -> None:
    assert run(*make(shape), backend).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str, dtype: torch.dtype) -> None:
    for shape in ((4, 33, 264), (3, 21, 77)):
        given = make(shape, dtype)
        with new_memory_is_nan():
            first, second = run(*given, backend), run(*given, backend)
        assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, *EMPTY]:
        for bias_dtype in {dtype, torch.float32}:
            x, bias = make(shape, dtype, bias_dtype)
            with host_shim("bias_gelu", order), new_memory_is_nan():
                found = run(x, bias, "cpu")
                assert torch.equal(run(x, bias, "cpu", inplace=True), found)
            check_against_torch(found, x, bias)


def test_cuda_source_has_right_tails(host_shim: HostShim) -> None:
    with host_shim("bias_gelu", "forward"):
        found = run(*tails(), "cpu")
    check_tails(found)


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    x, bias = (tensor.to("cuda") for tensor in make((4, 300, 8960), torch.bfloat16))
    expected = bias_gelu(x, bias, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = bias_gelu(x, bias, backend="cuda")
    stream.synchronize()
    assert torch.equal(found, expected)


# Gradients.


def test_gradients_by_gradcheck() -> None:
    given = [tensor.requires_grad_() for tensor in make((2, 3, 2, 5), torch.float64)]
    assert torch.autograd.gradcheck(reference_bias_gelu, given)
    # The registered op takes the reference for float64, and its own backward.
    assert torch.autograd.gradcheck(torch.ops.u4d_fast.bias_gelu, given)


def gradients(x: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, ...]:
    leaves = [tensor.to(device_of(backend)).requires_grad_() for tensor in (x, bias)]
    out = bias_gelu(leaves[0], leaves[1], backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    return torch.autograd.grad(out, leaves, weights.to(out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_are_no_worse_than_torchs(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for bias_dtype in {dtype, torch.float32}:
        x, bias = make(shape, dtype, bias_dtype)
        exact = gradients(x.double(), bias.double(), "reference")
        plain, fast = gradients(x, bias, "reference"), gradients(x, bias, backend)
        for found, torchs, truth in zip(fast, plain, exact, strict=True):
            assert_no_worse(found, torchs, truth)


# Torch and arguments.


def test_registered_ops_keep_torchs_rules() -> None:
    x, bias = make((2, 3, 8), torch.bfloat16)
    torch.library.opcheck(torch.ops.u4d_fast.bias_gelu_inplace.default, (x, bias))
    torch.library.opcheck(torch.ops.u4d_fast.bias_gelu.default, (x.requires_grad_(), bias.requires_grad_()))


def test_compiles_whole_with_gradients() -> None:
    given = [tensor.requires_grad_() for tensor in make((2, 3, 8))]

    def length(*tensors: Tensor) -> Tensor:
        return bias_gelu(*tensors).cos().sum()

    eager = torch.autograd.grad(length(*given), given)
    compiled = torch.autograd.grad(torch.compile(length, fullgraph=True, backend="aot_eager")(*given), given)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


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
