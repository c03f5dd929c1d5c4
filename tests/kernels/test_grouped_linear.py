"""grouped_linear and grouped_linear_fp8 against torch's linear layers, their gradients and their arguments."""

from __future__ import annotations

import pytest
import torch
from linear_layers import Shape, make, make_fp8
from torch import Tensor
from torch.nn.functional import gelu, linear

from u4d_fast import backend as backends
from u4d_fast.fp8 import Fp8Rows
from u4d_fast.ops import grouped_linear as op_file
from u4d_fast.ops.grouped_linear import grouped_linear, grouped_linear_fp8
from u4d_fast.reference.grouped_linear import grouped_linear as reference_grouped_linear
from u4d_fast.reference.quantize_rows import quantize_rows
from u4d_fast.scaled_mm import scaled_mm_by_stream, takes_scaled_mm

SHAPE = Shape(2, 15, 32, 48)


def by_stream(x: Tensor, weight: Tensor, bias: Tensor | None, with_gelu: bool) -> Tensor:
    """torch's linear layer in each stream."""
    parts = [linear(x[s], weight[s], None if bias is None else bias[s]) for s in range(len(x))]
    out = torch.stack(parts)
    return gelu(out, approximate="tanh") if with_gelu else out


def in_clips(x: Tensor) -> Tensor:
    """[S,M,...] -> [S,3,M/3,...]."""
    return x.unflatten(1, (3, -1))


@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_is_a_linear_layer_in_every_stream(with_bias: bool, with_gelu: bool) -> None:
    x, weight, bias = make(SHAPE, torch.float64)
    given = in_clips(x), weight, bias if with_bias else None
    found = grouped_linear(*given, gelu=with_gelu)
    torch.testing.assert_close(found, by_stream(*given, with_gelu))
    assert torch.equal(found, reference_grouped_linear(*given, with_gelu)) and found.shape == (2, 3, 5, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    x, weight, bias = make(SHAPE, dtype)
    found = grouped_linear(x, weight, bias.float(), gelu=True)
    assert found.dtype == dtype
    expected = by_stream(*(part.float() for part in (x, weight, bias)), True)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("with_gelu", [False, True])
def test_fp8_is_the_product_of_what_the_rows_stand_for(with_gelu: bool) -> None:
    x, weight, bias = make_fp8(SHAPE)
    for one in (bias, None):
        expected = by_stream(x.dequantize(), weight.dequantize(), None if one is None else one.float(), with_gelu)
        found = grouped_linear_fp8(Fp8Rows(*map(in_clips, x)), weight, one, gelu=with_gelu, dtype=torch.float32)
        torch.testing.assert_close(found, in_clips(expected))
        assert grouped_linear_fp8(x, weight, one).dtype == torch.bfloat16


def test_fp8_is_near_what_was_quantised() -> None:
    x, weight, bias = make(Shape(2, 33, 64, 512), torch.float32)
    found = grouped_linear_fp8(quantize_rows(x), quantize_rows(weight), bias, dtype=torch.float32)
    expected = grouped_linear(x, weight, bias)
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.11 takes scales of rows on GPUs only")
@pytest.mark.parametrize("with_gelu", [False, True])
def test_torchs_scaled_product_is_the_same(with_gelu: bool) -> None:
    """torch has it on CPUs too; it adds the bias to what it has rounded."""
    x, weight, bias = make_fp8(SHAPE)
    x = Fp8Rows(*map(in_clips, x))
    for one in (bias, None):
        found = scaled_mm_by_stream(x, weight, one, with_gelu)
        expected = grouped_linear_fp8(x, weight, one, gelu=with_gelu)
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
    assert not takes_scaled_mm(x, weight, torch.bfloat16)  # "auto" takes it on GPUs only


@pytest.mark.parametrize("shape", [Shape(0, 3, 8, 8), Shape(2, 0, 8, 8), Shape(2, 3, 0, 8)])
def test_nothing_gives_nothing(shape: Shape) -> None:
    x, weight, bias = make(shape)
    assert grouped_linear(x, weight, bias, gelu=True).shape == shape[:3]
    if shape.columns:
        assert grouped_linear_fp8(quantize_rows(x), quantize_rows(weight), bias, gelu=True).shape == shape[:3]


# Gradients.


def test_gradients_are_torchs() -> None:
    for with_gelu in (False, True):
        x, weight, bias = (tensor.requires_grad_() for tensor in make(Shape(2, 6, 8, 8), torch.float64))
        given = in_clips(x), weight, bias
        expected = torch.autograd.grad(by_stream(*given, with_gelu).cos().sum(), (x, weight, bias))
        found = torch.autograd.grad(grouped_linear(*given, gelu=with_gelu).cos().sum(), (x, weight, bias))
        written = torch.ops.u4d_fast.grouped_linear(*given, with_gelu)  # the gradient that the kernel has
        by_rule = torch.autograd.grad(written.cos().sum(), (x, weight, bias))
        for a, b, c in zip(expected, found, by_rule, strict=True):
            torch.testing.assert_close(b, a)
            torch.testing.assert_close(c, a)


def test_the_written_gradient_by_gradcheck() -> None:
    given = [tensor.requires_grad_() for tensor in make(Shape(2, 3, 3, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: torch.ops.u4d_fast.grouped_linear(*tensors, True), given)
    without = [*given[:2], None]
    assert torch.autograd.gradcheck(lambda *tensors: torch.ops.u4d_fast.grouped_linear(*tensors, False), without)


def test_fp8_has_no_gradients() -> None:
    x, weight, bias = make_fp8(SHAPE)
    bias.requires_grad_()
    with pytest.raises(ValueError, match=r"no gradients, but bias requires one; use torch\.no_grad\(\)"):
        grouped_linear_fp8(x, weight, bias)
    with torch.no_grad():
        grouped_linear_fp8(x, weight, bias)


# Torch and arguments.


def test_registered_ops_keep_torchs_rules() -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in make(SHAPE))
    torch.library.opcheck(torch.ops.u4d_fast.grouped_linear.default, (x, weight, bias, True))
    shapes_only = {"test_utils": ("test_faketensor",)}
    torch.library.opcheck(torch.ops.u4d_fast.grouped_linear.default, (x, weight, None, False), **shapes_only)
    rows, weights, bias = make_fp8(SHAPE)
    # The whole check compares tensors by allclose, which torch does not have for float8.
    torch.library.opcheck(torch.ops.u4d_fast.grouped_linear_fp8.default, (*rows, *weights, bias, True), **shapes_only)


def test_compile_whole() -> None:
    x, weight, bias = make(SHAPE, torch.float32)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias, gelu=True), grouped_linear(x, weight, bias, gelu=True))
    given = make_fp8(SHAPE)
    compiled = torch.compile(grouped_linear_fp8, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), grouped_linear_fp8(*given))


def test_shapes_alone() -> None:
    x, weight, bias = (tensor.to("meta") for tensor in make(SHAPE))
    assert grouped_linear(in_clips(x), weight, bias, gelu=True).shape == (2, 3, 5, 32)
    rows, weights, bias = make_fp8(SHAPE)
    on_meta = [Fp8Rows(*(part.to("meta") for part in given)) for given in (rows, weights)]
    found = grouped_linear_fp8(*on_meta, bias.to("meta"))
    assert found.shape == (2, 15, 32) and found.dtype == torch.bfloat16


def test_there_is_no_cpu_kernel() -> None:
    x, weight, bias = make(SHAPE)
    with pytest.raises(backends.BackendError, match="grouped_linear: backend 'cpu' cannot run"):
        grouped_linear(x, weight, bias, backend="cpu")
    with pytest.raises(backends.BackendError, match="'cuda' was asked for, but the tensors are on cpu"):
        grouped_linear_fp8(*make_fp8(SHAPE), backend="cuda")


def test_what_the_kernels_refuse() -> None:
    take = torch.zeros(2, 16, 48, dtype=torch.bfloat16)
    assert op_file._refused(take, take) == "" == op_file._refused_fp8(take, torch.bfloat16)
    assert op_file._refused(take.float(), take.float()) == "the kernel takes bfloat16, got torch.float32"
    assert op_file._refused(take[..., :44], take[..., :44]).startswith("the kernel takes N a multiple of 8 and K of 8")
    assert op_file._refused_fp8(take[..., :40], torch.bfloat16).startswith("the kernel takes N a multiple of 8 and K o")
    assert op_file._refused_fp8(take, torch.float32) == "the kernel gives bfloat16, asked for was torch.float32"


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 8), (2, 4, 8), (2, 4), r"x: expected \[S,...,K\] with at least three dimensions and one channel, got"),
        ((2, 3, 0), (2, 4, 0), None, r"x: expected \[S,...,K\] with at least three dimensions and one channel, got"),
        ((2, 3, 8), (4, 8), None, r"weight: expected \[S,N,K\], got \[4,8\]"),
        ((2, 3, 8), (2, 4, 6), None, r"weight: expected \[2,4,8\] to match x \[2,3,8\], got \[2,4,6\]"),
        ((2, 3, 8), (3, 4, 8), None, r"weight: expected \[2,4,8\] to match x \[2,3,8\], got \[3,4,8\]"),
        ((2, 3, 8), (2, 4, 8), (2, 8), r"bias: expected \[2,4\] to match weight \[2,4,8\], got \[2,8\]"),
    ],
)
def test_bad_shapes(x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_linear(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))


def test_bad_dtypes() -> None:
    x, weight, bias = make(SHAPE)
    with pytest.raises(TypeError, match=r"weight: expected torch\.bfloat16 to match x, got torch\.float32"):
        grouped_linear(x, weight.float(), bias)
    with pytest.raises(TypeError, match="x: expected float32, float64, bfloat16 or float16"):
        grouped_linear(x.long(), weight, bias)
    rows, weights, bias = make_fp8(SHAPE)
    with pytest.raises(TypeError, match="x: expected Fp8Rows, as quantize_rows gives them, got Tensor"):
        grouped_linear_fp8(x, weights, bias)
    with pytest.raises(TypeError, match=r"weight\.scale: expected float32, got torch\.float64"):
        grouped_linear_fp8(rows, Fp8Rows(weights.values, weights.scale.double()), bias)
    with pytest.raises(TypeError, match=r"x\.values: expected float8_e4m3fn, got torch\.float8_e5m2"):
        grouped_linear_fp8(Fp8Rows(rows.values.float().to(torch.float8_e5m2), rows.scale), weights)
    with pytest.raises(ValueError, match=r"x\.scale: expected \[2,15\] to match x\.values \[2,15,48\], got \[2,14\]"):
        grouped_linear_fp8(Fp8Rows(rows.values, rows.scale[:, :14]), weights)
