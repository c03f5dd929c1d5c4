"""qk_norm_rope against norm, rotation and layout one after the other, its kernels, and its gradients."""

from __future__ import annotations

import pytest
import torch
from activations import DTYPES, activations, layouts
from torch import Tensor
from warp_scenes import assert_no_worse

import u4d_fast
import u4d_fast.ops.qk_norm_rope as module
from u4d_fast.reference.qk_norm_rope import rotate, rotate_grad

KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ORDERS = ["forward", "reverse"]
# (S, B, T, heads, d). Between them: a warp for a row, a block for a row, a head that is no whole vectors, angles that
# are read once for all heads and anew for each, rows too wide to be held.
SIZES = [
    (4, 2, 5, 12, 128),
    (1, 1, 1, 1, 2),
    (2, 1, 3, 5, 24),
    (1, 2, 2, 64, 128),
    (3, 1, 5, 3, 10),
    (1, 1, 2, 3, 5464),
]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def given(size: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Arguments:
    """x, weight, cos, sin; the tables are float32, or float64 beside float64."""
    streams, batch, tokens, heads, head_dim = size
    width = heads * head_dim
    weight = 1 + activations((1, 1, streams, width), seed=1)[0, 0].clamp(-0.9, 2)
    angles = 10 * activations((1, 1, tokens, head_dim // 2), seed=2)[0, 0]
    table = torch.float64 if dtype == torch.float64 else torch.float32
    x = activations((streams, batch, tokens, width), dtype)
    return x, weight.to(weight_dtype or dtype), angles.cos().to(table), angles.sin().to(table)


def on(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to("cuda" if backend == "cuda" else "cpu") for tensor in tensors]


def exactly(*tensors: Tensor, heads: int, eps: float = 1e-6) -> Tensor:
    return u4d_fast.reference.qk_norm_rope(*(tensor.double() for tensor in tensors), heads, eps)


def test_reference_turns_pairs_as_complex_numbers_and_puts_streams_one_after_the_other() -> None:
    x, weight, cos, sin = given((3, 2, 4, 5, 6), torch.float64)
    found = u4d_fast.reference.qk_norm_rope(x, weight, cos, sin, 5, 1e-5)
    assert found.shape == (2, 12, 5, 6) and found.is_contiguous()
    normed = u4d_fast.reference.rms_norm(x, weight, 1e-5).unflatten(-1, (5, 3, 2))
    turned = torch.view_as_real(torch.view_as_complex(normed) * torch.complex(cos, sin)[:, None]).flatten(-2)
    for stream in range(3):
        torch.testing.assert_close(found[:, 4 * stream : 4 * stream + 4], turned[stream])


def test_scores_depend_on_the_distance_of_tokens_only() -> None:
    q, k = activations((1, 1, 1, 8)).expand(1, 1, 6, -1), activations((1, 1, 1, 8), seed=1).expand(1, 1, 6, -1)
    angles = torch.outer(torch.arange(6, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64))
    q, k = (
        u4d_fast.qk_norm_rope(part + 1, torch.ones(1, 8).double(), angles.cos(), angles.sin(), 1)[0, :, 0]
        for part in (q, k)
    )
    scores = q @ k.T
    for distance in range(-5, 6):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    for weight_dtype in {dtype, torch.float32}:
        tensors = given(size, dtype, weight_dtype)
        fast = u4d_fast.qk_norm_rope(*on(backend, *tensors), size[3], backend=backend)
        streams, batch, tokens, heads, head_dim = size
        assert fast.dtype == dtype and fast.is_contiguous()
        assert fast.shape == (batch, streams * tokens, heads, head_dim)
        plain = u4d_fast.reference.qk_norm_rope(*tensors, heads)
        assert_no_worse(fast.cpu(), plain, exactly(*tensors, heads=heads), floor=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_any_memory_layout_and_no_rows(backend: str, dtype: torch.dtype) -> None:
    x, weight, cos, sin = given((2, 3, 4, 3, 16), dtype)
    expected = u4d_fast.qk_norm_rope(*on(backend, x, weight, cos, sin), 3, backend=backend).cpu()
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 0, "atol": 2e-6}
    for name, same in layouts(x).items():
        tables = (cos.T.contiguous().T, torch.stack((sin, sin), -1)[..., 0])
        found = u4d_fast.qk_norm_rope(*on(backend, same, weight, *tables), 3, backend=backend).cpu()
        torch.testing.assert_close(found, expected, **tolerance, msg=name)
    for nothing in (x[:0], x[:, :0], x[:, :, :0]):
        tables = (cos[: nothing.shape[2]], sin[: nothing.shape[2]])
        found = u4d_fast.qk_norm_rope(*on(backend, nothing, weight[: len(nothing)], *tables), 3, backend=backend)
        assert found.shape == (nothing.shape[1], len(nothing) * nothing.shape[2], 3, 16)


@pytest.mark.parametrize("backend", KERNELS)
def test_every_output_is_written_and_the_same_each_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module._output
    monkeypatch.setattr(module, "_output", lambda *a: plain(*a).fill_(torch.nan))
    for size in SIZES:
        tensors = on(backend, *given(size, torch.bfloat16))
        first = u4d_fast.qk_norm_rope(*tensors, size[3], backend=backend)
        assert first.isfinite().all()
        assert torch.equal(first, u4d_fast.qk_norm_rope(*tensors, size[3], backend=backend))


def test_threads_do_not_change_a_bit() -> None:
    tensors = given((2, 2, 30, 4, 64), torch.bfloat16)
    expected = u4d_fast.qk_norm_rope(*tensors, 4, backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(u4d_fast.qk_norm_rope(*tensors, 4, backend="cpu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim, dtype: torch.dtype, order: str) -> None:
    for size in SIZES:
        for weight_dtype in {dtype, torch.float32}:
            tensors = given(size, dtype, weight_dtype)
            with host_shim("qk_norm_rope", order):
                fast = u4d_fast.qk_norm_rope(*tensors, size[3], backend="cpu")
            plain = u4d_fast.reference.qk_norm_rope(*tensors, size[3])
            assert_no_worse(fast, plain, exactly(*tensors, heads=size[3]), floor=1e-6)
    with host_shim("qk_norm_rope", order):
        test_any_memory_layout_and_no_rows("cpu", dtype)


@pytest.mark.gpu
def test_runs_on_the_callers_stream_and_in_a_graph() -> None:
    tensors = on("cuda", *given((4, 1, 300, 12, 128), torch.bfloat16))
    expected = u4d_fast.qk_norm_rope(*tensors, 12, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = u4d_fast.qk_norm_rope(*tensors, 12, backend="cuda")
    stream.synchronize()
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = u4d_fast.qk_norm_rope(*tensors, 12, backend="cuda")
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_gradients_of_the_reference() -> None:
    x, weight, cos, sin = given((2, 1, 3, 2, 4), torch.float64)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *a: u4d_fast.reference.qk_norm_rope(*a, cos, sin, 2, 1e-2), leaves)


def test_turning_back_is_the_gradient_of_turning() -> None:
    _, _, cos, sin = given((2, 1, 3, 2, 4), torch.float64)
    x, grad = activations((2, 5, 3, 2, 4)), activations((5, 6, 2, 4), seed=3)
    turned = rotate(x, 2 * cos, sin).transpose(0, 1).flatten(1, 2)
    back = rotate_grad(grad, 2 * cos, sin, streams=2)
    torch.testing.assert_close((turned * grad).sum(), (x.flatten(-2) * back).sum())


def gradients(tensors: list[Tensor], heads: int, grad: Tensor, backend: str) -> list[Tensor]:
    x, weight = (tensor.detach().requires_grad_() for tensor in tensors[:2])
    rotated = u4d_fast.qk_norm_rope(x, weight, *tensors[2:], heads, 1e-4, backend=backend)
    return [part.cpu() for part in torch.autograd.grad(rotated, (x, weight), grad)]


@pytest.mark.parametrize("size", [(4, 2, 50, 2, 64), (2, 1, 7, 12, 128), (1, 2, 70, 3, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_are_no_worse_than_torchs(backend: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    tensors = given(size, dtype, torch.float32)
    streams, batch, tokens, heads, head_dim = size
    grad = activations((batch, streams * tokens, heads, head_dim), dtype, seed=4)
    exact = gradients([tensor.double() for tensor in tensors], heads, grad.double(), "reference")
    plain = gradients(list(tensors), heads, grad, "reference")
    *moved, moved_grad = on(backend, *tensors, grad)
    fast = gradients(moved, heads, moved_grad, backend)
    for found, torchs, truth, like in zip(fast, plain, exact, tensors[:2], strict=True):
        assert found.dtype == like.dtype and found.shape == like.shape
        scale = truth.abs().max()
        assert_no_worse(found / scale, torchs / scale, truth / scale, floor=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_cuda_source(host_shim, dtype: torch.dtype, order: str) -> None:
    for size in ((2, 2, 21, 2, 32), (1, 1, 9, 12, 128), (2, 1, 3, 257, 8)):  # a warp for a row, or a block
        x, weight, cos, sin = given(size, dtype)
        streams, batch, tokens, heads, head_dim = size
        tensors = [layouts(x)["clips before streams"], weight, cos, sin]
        grad = activations((batch, streams * tokens, heads, head_dim), dtype, seed=4)
        expected = gradients(tensors, heads, grad, "cpu")
        with host_shim("qk_norm_rope", order):
            found = gradients(tensors, heads, grad, "cpu")
        for a, b in zip(found, expected, strict=True):
            # What differs is rounded differently at the very end, or is a rounding error of a sum.
            torch.testing.assert_close(a, b, rtol=2e-5 if dtype == torch.float32 else 8e-3, atol=1e-5 * b.abs().max())


@pytest.mark.parametrize("backend", KERNELS)
def test_every_gradient_is_written_and_the_same_each_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = module.partial_sums
    monkeypatch.setattr(module, "partial_sums", lambda *a: sums(*a).fill_(torch.nan))
    for size in ((4, 2, 50, 2, 32), (1, 1, 1, 1, 8), (2, 1, 9, 257, 8)):
        tensors = on(backend, *given(size, torch.bfloat16))
        streams, batch, tokens, heads, head_dim = size
        grad = tensors[0].view(batch, streams * tokens, heads, head_dim)
        first = gradients(tensors, heads, grad, backend)
        assert all(part.isfinite().all() for part in first)
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(tensors, heads, grad, backend), strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_registered_op_keeps_torchs_rules(backend: str) -> None:
    x, weight, cos, sin = on(backend, *given((2, 2, 3, 2, 8), torch.bfloat16, torch.float32))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.u4d_fast.qk_norm_rope.default, (x, weight, cos, sin, 2, 1e-6))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_whole_with_gradients(backend: str) -> None:
    x, weight, cos, sin = given((2, 2, 3, 2, 8), torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def length(x: Tensor, weight: Tensor) -> Tensor:
        return u4d_fast.qk_norm_rope(x, weight, cos, sin, 2, backend=backend).sin().sum()

    eager = torch.autograd.grad(length(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(length, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"heads: expected a divisor of D = 16 that leaves an even d, got 3"),
        ({"heads": 16}, r"heads: expected a divisor of D = 16 that leaves an even d, got 16"),
        ({"heads": 0}, r"heads: expected a divisor"),
        ({"cos": torch.ones(3, 8)}, r"cos: expected \[3,4\] to match x \[2,1,3,16\], got \[3,8\]"),
        ({"sin": torch.ones(2, 4)}, r"sin: expected \[3,4\] to match x"),
        ({"sin": torch.ones(3, 4, requires_grad=True)}, r"sin: expected a constant table"),
        ({"weight": torch.ones(16)}, r"weight: expected \[S,D\], got \[16\]"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    x, weight, cos, sin = given((2, 1, 3, 2, 8), torch.float32)
    tensors = {"x": x, "weight": weight, "cos": cos, "sin": sin, "heads": 2} | change
    with pytest.raises(ValueError, match=message):
        u4d_fast.qk_norm_rope(**tensors)


def test_dtypes() -> None:
    tensors = given((2, 1, 3, 2, 8), torch.float64)
    assert u4d_fast.qk_norm_rope(*tensors, 2).dtype == torch.float64
    with pytest.raises(u4d_fast.BackendError, match=r"take float32, bfloat16, float16, got torch\.float64"):
        u4d_fast.qk_norm_rope(*tensors, 2, backend="cpu")
    with pytest.raises(TypeError, match=r"cos: expected a floating dtype, got torch\.int64"):
        u4d_fast.qk_norm_rope(*tensors[:2], tensors[2].long(), tensors[3], 2)


def test_kernels_refuse_what_breaks_their_contract() -> None:
    kernels = u4d_fast.backend.kernels
    for heads, head_dim in ((0, 8), (1, 7), (1, -2)):
        with pytest.raises(ValueError, match="qk_norm_rope_cpu: sizes break the kernel's contract"):
            kernels.qk_norm_rope_cpu(1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, heads, head_dim, 8, 8, 8, 1e-6)
