"""causal_norm_silu against its definition and torch's own steps, its kernels against float64, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
import torch
from block_rows import DTYPES, KERNELS, ORDERS, assert_no_worse, device_of, new_memory_is_nan
from torch import Tensor
from torch.nn.functional import normalize, silu

from u4d_fast import backend as backends
from u4d_fast import reference
from u4d_fast.ops.causal_norm_silu import causal_norm_silu, residual_causal_norm_silu

HostShim = Callable[[str, str], AbstractContextManager[None]]
# Channels: one, odd ones, whole vectors with idle threads, the three widths of Wan's VAE, the widest that is held in
# registers in float32, wider ones.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 5, 7),
    (1, 2, 3, 3, 40),
    (2, 1, 4, 9, 96),
    (1, 2, 5, 7, 192),
    (1, 1, 3, 3, 384),
    (1, 1, 2, 3, 1000),
]
EMPTY = [(0, 2, 3, 3, 8), (1, 0, 3, 3, 8), (2, 2, 0, 3, 8), (1, 2, 2, 2, 0)]


class Given(NamedTuple):
    """Arguments of both ops; `update` is what residual_causal_norm_silu takes besides."""

    x: Tensor
    update: Tensor
    gamma: Tensor
    bias: Tensor | None
    before: Tensor | None

    def to(self, *how: object) -> Given:
        return Given(*(None if part is None else part.to(*how) for part in self))  # type: ignore[call-overload]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, table: torch.dtype | None = None) -> Given:
    """Random activations of very different lengths, and all that is optional."""
    g = torch.Generator().manual_seed(sum(shape))
    x, update = (torch.randn(shape, generator=g) for _ in range(2))
    x = x * torch.rand(*shape[:-1], 1, generator=g).mul(6).sub(3).exp()
    gamma, bias = (torch.randn(shape[-1], generator=g).to(table or dtype) for _ in range(2))
    before = torch.randn(shape[0], 2, *shape[2:], generator=g)
    return Given(x.to(dtype), update.to(dtype), gamma, bias, before.to(dtype))


def kinds(given: Given) -> list[Given]:
    """With and without what is optional."""
    return [given, given._replace(bias=None), given._replace(before=None), given._replace(bias=None, before=None)]


def both(given: Given, backend: str) -> tuple[Tensor, ...]:
    """What the two ops give: normed, and the sum with its norm."""
    x, update, *rest = given.to(device_of(backend))
    return causal_norm_silu(x, *rest, backend=backend), *residual_causal_norm_silu(x, update, *rest, backend=backend)


def check_against_torch(found: tuple[Tensor, ...], given: Given) -> None:
    exact = both(given.to(torch.float64), "reference")
    # The norm of a sum that was rounded: of that sum, in float64.
    rounded = both(given, "reference")[1]
    exact = (*exact[:2], reference.causal_norm_silu(rounded.double(), given.gamma.double(), before=exact[2][:, :2]))
    for value, torchs, truth in zip(found, both(given, "reference"), exact, strict=True):
        assert_no_worse(value, torchs, truth)


def test_reference_is_what_wans_vae_does() -> None:
    """diffusers' `WanRMS_norm`, SiLU, and the frames that a causal convolution puts in front."""
    x, update, gamma, bias, before = make((2, 3, 2, 5, 16), torch.float64)
    assert bias is not None and before is not None

    def theirs(rows: Tensor) -> Tensor:
        return silu(normalize(rows, dim=-1) * 16**0.5 * gamma)

    torch.testing.assert_close(causal_norm_silu(x, gamma)[:, 2:], theirs(x))
    assert not causal_norm_silu(x, gamma)[:, :2].any()
    torch.testing.assert_close(causal_norm_silu(x, gamma, bias, before), torch.cat((before, theirs(x + bias)), 1))
    total, normed = residual_causal_norm_silu(x, update, gamma, bias, before)
    torch.testing.assert_close(total, x + update + bias)
    torch.testing.assert_close(normed, torch.cat((before, theirs(total)), 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_is_no_worse_than_torch(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for table in {dtype, torch.float32}:
        for given in kinds(make(shape, dtype, table)):
            check_against_torch(tuple(out.cpu() for out in both(given, backend)), given)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, order: str, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, *EMPTY]:
        given = make(shape, dtype)
        for each in kinds(given)[:: 3 if shape[-1] > 1 else 1]:
            with host_shim("causal_norm_silu", order), new_memory_is_nan():
                found = both(each, "cpu")
            check_against_torch(found, each)
    mixed = make((1, 2, 2, 3, 96), dtype, torch.float32)
    with host_shim("causal_norm_silu", order), new_memory_is_nan():
        check_against_torch(both(mixed, "cpu"), mixed)


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nothing_gives_nothing_behind_the_frames_before(backend: str, shape: tuple[int, ...]) -> None:
    given = make(shape)
    normed, total, again = both(given, backend)
    assert total.shape == shape and normed.shape == again.shape == (shape[0], 2 + shape[1], *shape[2:])
    assert given.before is not None and torch.equal(normed[:, :2].cpu(), given.before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str, dtype: torch.dtype) -> None:
    for shape in ((2, 3, 4, 5, 96), (1, 3, 3, 3, 77)):
        for given in kinds(make(shape, dtype)):
            with new_memory_is_nan():
                first, second = both(given, backend), both(given, backend)
            assert all(out.isfinite().all() for out in first)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rows_of_zeros_and_values_that_are_not_finite(backend: str) -> None:
    """A row of zeros stays one; a NaN reaches all channels of its pixel, since its norm is one, and no other pixel."""
    x, _, gamma, *_ = make((1, 1, 2, 3, 96)).to(device_of(backend))
    x[0, 0, 0, 0], x[0, 0, 1, 1, 5], x[0, 0, 1, 2, 7] = 0, torch.nan, torch.inf
    found = causal_norm_silu(x, gamma, backend=backend)[0, 2]
    assert (found[0, 0] == 0).all() and found[1, 1].isnan().all() and found[1, 2, 7].isnan()
    assert (found[1, 2, :7] == 0).all() and found[0].isfinite().all() and found[1, 0].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_strided_inputs(backend: str) -> None:
    given = make((2, 3, 4, 5, 96), torch.bfloat16).to(device_of(backend))
    spread = Given(*(part.mT.contiguous().mT if part.ndim > 1 else part.repeat_interleave(2)[::2] for part in given))  # type: ignore[union-attr]
    assert not spread.x.is_contiguous() and not spread.gamma.is_contiguous()
    for found, expected in zip(both(spread, backend), both(given, backend), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_on_another_stream() -> None:
    given = make((1, 9, 60, 80, 192), torch.bfloat16).to("cuda")
    expected = both(given, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = both(given, "cuda")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Gradients.


def leaves(given: Given) -> list[Tensor]:
    return [part.clone().requires_grad_() for part in given if part is not None]


def test_gradients_by_gradcheck() -> None:
    given = make((1, 2, 2, 2, 5), torch.float64)
    registered = torch.ops.u4d_fast.causal_norm_silu
    for each in kinds(given):
        names = [name for name, part in zip(Given._fields, each, strict=True) if part is not None]

        def call(*parts: Tensor, names: list[str] = names) -> tuple[Tensor, ...]:
            named = {"bias": None, "before": None, **dict(zip(names, parts, strict=True))}
            x, update, gamma, bias, before = (named[name] for name in Given._fields)
            alone = registered(x, gamma, bias, None, before)[1]
            return alone, *registered(update, gamma, bias, x, before)  # for float64 the reference, with its backward

        assert torch.autograd.gradcheck(call, leaves(each))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_are_no_worse_than_torchs(backend: str, dtype: torch.dtype) -> None:
    given = make((1, 2, 3, 3, 96), dtype)

    def gradients(how: Given, chosen: str) -> tuple[Tensor, ...]:
        parts = leaves(how.to(device_of(chosen)))
        outs = both(Given(*parts), chosen)
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outs]
        return torch.autograd.grad(outs, parts, weights)

    exact = gradients(given.to(torch.float64), "reference")
    for found, torchs, truth in zip(gradients(given, backend), gradients(given, "reference"), exact, strict=True):
        assert_no_worse(found, torchs, truth.cpu())


def test_gradient_of_a_row_of_zeros_is_finite() -> None:
    x = torch.zeros(1, 1, 1, 1, 8, requires_grad=True)
    causal_norm_silu(x, torch.ones(8), backend="cpu").sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    x, update, gamma, bias, before = leaves(make((1, 2, 2, 2, 8), torch.bfloat16))
    torch.library.opcheck(torch.ops.u4d_fast.causal_norm_silu.default, (x, gamma, bias, update, before))


def test_compiles_whole() -> None:
    given = make((1, 2, 2, 3, 8))

    def twice(*parts: Tensor) -> Tensor:
        total, normed = residual_causal_norm_silu(*parts)
        return causal_norm_silu(total, parts[2], before=normed[:, -2:])

    torch.testing.assert_close(torch.compile(twice, fullgraph=True, backend="aot_eager")(*given), twice(*given))


def test_where_there_is_no_kernel_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda *_: "none was built")
    given = make((1, 2, 2, 3, 8))
    for found, expected in zip(both(given, "auto"), both(given, "reference"), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 8)}, r"x: expected \[B,T,H,W,C\], got \[2,3,4,8\]"),
        ({"gamma": torch.zeros(7)}, r"gamma: expected \[8\] to match x \[1,2,2,3,8\], got \[7\]"),
        ({"bias": torch.zeros(1, 8)}, r"bias: expected \[8\] to match x"),
        ({"before": torch.zeros(1, 1, 2, 3, 8)}, r"before: expected \[1,2,2,3,8\] to match x"),
        ({"update": torch.zeros(1, 1, 2, 3, 8)}, r"update: expected \[1,2,2,3,8\] to match x"),
    ],
)
def test_bad_shapes(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_causal_norm_silu(*make((1, 2, 2, 3, 8))._replace(**changes))


def test_other_types_are_refused() -> None:
    given = make((1, 2, 2, 3, 8))
    for name in ("update", "before"):
        with pytest.raises(TypeError, match=rf"{name}: expected torch.float32 like x \[1,2,2,3,8\], got torch.float64"):
            residual_causal_norm_silu(*given._replace(**{name: getattr(given, name).double()}))
    with pytest.raises(TypeError, match=r"gamma: expected a floating dtype, got torch\.int64"):
        causal_norm_silu(given.x, given.gamma.long())
