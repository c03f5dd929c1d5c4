"""rms_norm against torch's own norm, its kernels against the float64 reference, and its gradients."""

from __future__ import annotations

import pytest
import torch
from activations import DTYPES, activations, layouts
from torch import Tensor
from warp_scenes import assert_no_worse

import u4d_fast
import u4d_fast.ops.rms_norm as module
from u4d_fast.reference.rms_norm import rms_norm_grad

KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ORDERS = ["forward", "reverse"]
# Between them: a warp for a row, a block for a row, rows of no whole vectors, rows too wide to be held.
SHAPES = [
    (4, 2, 5, 1536),
    (1, 1, 1, 8),
    (2, 1, 3, 2056),
    (1, 2, 2, 8192),
    (3, 1, 5, 37),
    (1, 1, 1, 1),
    (1, 1, 2, 16392),
]


def given(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """x and weight, of values that dtype and weight_dtype can hold."""
    weight = 1 + activations((1, 1, shape[0], shape[3]), seed=1)[0, 0].clamp(-0.9, 2)
    return activations(shape, dtype), weight.to(weight_dtype or dtype)


def on(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to("cuda" if backend == "cuda" else "cpu") for tensor in tensors]


def test_reference_is_torchs_norm_of_each_stream() -> None:
    x, weight = given((3, 2, 4, 10), torch.float64)
    expected = [torch.nn.functional.rms_norm(part, (10,), scale, 1e-5) for part, scale in zip(x, weight, strict=True)]
    torch.testing.assert_close(u4d_fast.reference.rms_norm(x, weight, 1e-5), torch.stack(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for weight_dtype in {dtype, torch.float32}:
        x, weight = given(shape, dtype, weight_dtype)
        exact = u4d_fast.reference.rms_norm(x.double(), weight.double())
        fast = u4d_fast.rms_norm(*on(backend, x, weight), backend=backend)
        assert fast.dtype == dtype and fast.is_contiguous()
        assert_no_worse(fast.cpu(), u4d_fast.reference.rms_norm(x, weight), exact, floor=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_any_memory_layout_and_no_rows(backend: str, dtype: torch.dtype) -> None:
    x, weight = given((2, 3, 4, 48), dtype)
    expected = u4d_fast.rms_norm(*on(backend, x, weight), backend=backend).cpu()
    for name, same in layouts(x).items():
        found = u4d_fast.rms_norm(*on(backend, same, weight.T.contiguous().T), backend=backend).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6, msg=name)
    one = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(u4d_fast.rms_norm(*on(backend, one, weight), backend=backend)[:, 2].cpu(), expected[:, 0])
    for nothing in (x[:0], x[:, :0], x[:, :, :0]):
        scale = weight[: len(nothing)]
        assert u4d_fast.rms_norm(*on(backend, nothing, scale), backend=backend).shape == nothing.shape


@pytest.mark.parametrize("backend", KERNELS)
def test_every_output_is_written_and_the_same_each_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module._output
    monkeypatch.setattr(module, "_output", lambda *a: plain(*a).fill_(torch.nan))
    for shape in SHAPES:
        tensors = on(backend, *given(shape, torch.bfloat16))
        first = u4d_fast.rms_norm(*tensors, backend=backend)
        assert first.isfinite().all() and torch.equal(first, u4d_fast.rms_norm(*tensors, backend=backend))


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = given((1, 1, 3, 64), torch.bfloat16)
    x[0, 0, 1, 5] = torch.nan
    found = u4d_fast.rms_norm(x, weight, backend="cpu")
    assert found[0, 0, 1].isnan().all() and found[0, 0, [0, 2]].isfinite().all()


def test_threads_do_not_change_a_bit() -> None:
    tensors = given((2, 2, 30, 256), torch.bfloat16)
    expected = u4d_fast.rms_norm(*tensors, backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(u4d_fast.rms_norm(*tensors, backend="cpu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim, dtype: torch.dtype, order: str) -> None:
    for shape in SHAPES:
        for weight_dtype in {dtype, torch.float32}:
            x, weight = given(shape, dtype, weight_dtype)
            exact = u4d_fast.reference.rms_norm(x.double(), weight.double())
            with host_shim("rms_norm", order):
                fast = u4d_fast.rms_norm(x, weight, backend="cpu")
            assert_no_worse(fast, u4d_fast.reference.rms_norm(x, weight), exact, floor=1e-6)
    with host_shim("rms_norm", order):
        test_any_memory_layout_and_no_rows("cpu", dtype)


@pytest.mark.gpu
def test_runs_on_the_callers_stream_and_in_a_graph() -> None:
    x, weight = on("cuda", *given((4, 1, 300, 1536), torch.bfloat16))
    expected = u4d_fast.rms_norm(x, weight, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = u4d_fast.rms_norm(x, weight, backend="cuda")
    stream.synchronize()
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = u4d_fast.rms_norm(x, weight, backend="cuda")
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_gradients_of_the_reference() -> None:
    x, weight = (value.requires_grad_() for value in given((2, 1, 3, 6), torch.float64))
    assert torch.autograd.gradcheck(lambda *a: u4d_fast.reference.rms_norm(*a, 1e-2), (x, weight))


def gradients(x: Tensor, weight: Tensor, grad: Tensor, backend: str) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    normed = u4d_fast.rms_norm(x, weight, 1e-4, backend=backend)
    return [part.cpu() for part in torch.autograd.grad(normed, (x, weight), grad)]


def test_written_out_gradients_are_those_of_autograd() -> None:
    x, weight = given((2, 3, 5, 12), torch.float64)
    grad = activations(x.shape, seed=4)
    for found, expected in zip(rms_norm_grad(grad, x, weight, 1e-4), gradients(x, weight, grad, "auto"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(4, 2, 50, 64), (2, 1, 7, 1536), (1, 2, 70, 22)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_are_no_worse_than_torchs(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = given(shape, dtype, torch.float32)
    grad = activations(shape, dtype, seed=4)
    exact = gradients(x.double(), weight.double(), grad.double(), "reference")
    plain = gradients(x, weight, grad, "reference")
    fast = gradients(*on(backend, x, weight, grad), backend)
    for found, torchs, truth, like in zip(fast, plain, exact, (x, weight), strict=True):
        assert found.dtype == like.dtype and found.shape == like.shape
        scale = truth.abs().max()
        assert_no_worse(found / scale, torchs / scale, truth / scale, floor=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_cuda_source(host_shim, dtype: torch.dtype, order: str) -> None:
    for shape in ((2, 2, 21, 64), (1, 1, 9, 1536), (2, 1, 3, 2056)):  # a warp for a row, or a block
        x, weight = given(shape, dtype)
        x, grad = layouts(x)["clips before streams"], activations(shape, dtype, seed=4)
        expected = gradients(x, weight, grad, "cpu")
        with host_shim("rms_norm", order):
            found = gradients(x, weight, grad, "cpu")
        for a, b in zip(found, expected, strict=True):
            # What differs is rounded differently at the very end, or is a rounding error of a sum.
            torch.testing.assert_close(a, b, rtol=2e-5 if dtype == torch.float32 else 8e-3, atol=1e-5 * b.abs().max())


@pytest.mark.parametrize("backend", KERNELS)
def test_every_gradient_is_written_and_the_same_each_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, sums = module._output, module.partial_sums
    monkeypatch.setattr(module, "_output", lambda *a: plain(*a).fill_(torch.nan))
    monkeypatch.setattr(module, "partial_sums", lambda *a: sums(*a).fill_(torch.nan))
    for shape in ((4, 2, 50, 64), (1, 1, 1, 8), (2, 1, 9, 2056)):
        x, weight = on(backend, *given(shape, torch.bfloat16))
        first = gradients(x, weight, x, backend)
        assert all(part.isfinite().all() for part in first)
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(x, weight, x, backend), strict=True))
    nothing = gradients(x[:, :0], weight, x[:, :0], backend)
    assert nothing[0].numel() == 0 and not nothing[1].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_registered_op_keeps_torchs_rules(backend: str) -> None:
    x, weight = (value.requires_grad_() for value in on(backend, *given((2, 1, 3, 16), torch.bfloat16, torch.float32)))
    torch.library.opcheck(torch.ops.u4d_fast.rms_norm.default, (x, weight, 1e-6))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_whole_with_gradients(backend: str) -> None:
    tensors = [value.requires_grad_() for value in given((2, 1, 3, 16), torch.float32)]

    def length(x: Tensor, weight: Tensor) -> Tensor:
        return u4d_fast.rms_norm(x, weight, backend=backend).sin().sum()

    eager = torch.autograd.grad(length(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(length, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        ((2, 3, 8), (2, 8), ValueError, r"x: expected \[S,B,T,D\], got \[2,3,8\]"),
        ((2, 1, 3, 8), (8,), ValueError, r"weight: expected \[S,D\], got \[8\]"),
        ((2, 1, 3, 8), (1, 8), ValueError, r"weight: expected \[2,8\] to match x \[2,1,3,8\], got \[1,8\]"),
    ],
)
def test_bad_shapes(x: tuple[int, ...], weight: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        u4d_fast.rms_norm(torch.ones(x), torch.ones(weight))


def test_dtypes() -> None:
    x, weight = given((2, 1, 3, 8), torch.float64)
    assert u4d_fast.rms_norm(x, weight).dtype == torch.float64
    with pytest.raises(u4d_fast.BackendError, match=r"take float32, bfloat16, float16, got torch\.float64"):
        u4d_fast.rms_norm(x, weight, backend="cpu")
    mixed = u4d_fast.rms_norm(x.float(), weight.bfloat16(), backend="cpu")
    assert torch.equal(mixed, u4d_fast.rms_norm(x.float(), weight.bfloat16().float(), backend="cpu"))
    with pytest.raises(TypeError, match=r"x: expected a floating dtype, got torch\.int64"):
        u4d_fast.rms_norm(x.long(), weight)


def test_kernels_refuse_what_breaks_their_contract() -> None:
    kernels = u4d_fast.backend.kernels
    for dtype, weight_dtype, width in ((3, 3, 8), (1, 2, 8), (0, 1, 8), (0, 0, -1)):
        with pytest.raises(ValueError, match="rms_norm_cpu: sizes break the kernel's contract"):
            kernels.rms_norm_cpu(1, 0, 0, 0, dtype, weight_dtype, 1, 0, 1, width, 8, 8, 8, 1e-6)
