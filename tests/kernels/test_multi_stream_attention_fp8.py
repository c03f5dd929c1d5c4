"""fp8 attention over groups: its specification against float64, tracing, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from group_masks import GROUPS, MASKS, SIZE, as_pairs, attention_by_loop, existing, random_mask, random_qkv

import u4d_fast
from u4d_fast.ops.multi_stream_attention_fp8 import multi_stream_attention_fp8
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as exact_attention
from u4d_fast.reference.multi_stream_attention_fp8 import QUERY_CHUNK, quantize_heads
from u4d_fast.reference.multi_stream_attention_fp8 import multi_stream_attention_fp8 as reference_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def registered() -> Any:
    return torch.ops.u4d_fast.multi_stream_attention_fp8.default


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# Values.


@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name: str) -> None:
    given, mask = random_qkv(1), MASKS[name]()
    exact = attention_by_loop(*given, as_pairs(mask))
    found = multi_stream_attention_fp8(*(x.float() for x in given), SIZE, mask)
    assert (found.double() - exact).norm() <= 0.1 * exact.norm()
    assert not found[(exact == 0).all(-1)].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_error_is_that_of_three_bits(dim: int, dtype: torch.dtype) -> None:
    """q, k, v and the weights keep 4 bits of mantissa: each is off by 2.6 % on the average, and q with k by 3.7 %."""
    given = random_qkv(2, dtype, (1, 600, 2, dim))
    exact = exact_attention(*(x.double() for x in given), 600)
    found = multi_stream_attention_fp8(*given, 600)
    assert found.dtype == dtype and 0.03 < relative_error(found, exact) < 0.06


def test_a_mean_of_similar_values_is_better() -> None:
    q, k, v = random_qkv(3, torch.float32, (1, 600, 2, 64))
    given = [q, k, v + 3]
    exact = exact_attention(*(x.double() for x in given), 600)
    assert relative_error(multi_stream_attention_fp8(*given, 600), exact) < 0.005


def test_what_e4m3_holds_is_attended_to_exactly() -> None:
    """Two keys of equal score: weights of 1, and values that are multiples of the scale."""
    q, k = torch.zeros(1, 2, 1, 64), torch.ones(1, 2, 1, 64)
    v = torch.stack((torch.full((64,), 448.0), torch.full((64,), -32.0)))[None, :, None]
    assert torch.equal(multi_stream_attention_fp8(q, k, v, 2), torch.full_like(q, 208.0))


def test_more_queries_than_are_worked_on_at_a_time() -> None:
    given = random_qkv(4, torch.float32, (1, QUERY_CHUNK + 8, 1, 8))
    whole = multi_stream_attention_fp8(*given, 8)
    last = multi_stream_attention_fp8(given[0].roll(8, 1), *given[1:], 8)
    torch.testing.assert_close(last[:, :8], whole[:, -8:])


@pytest.mark.parametrize("shape", [(0, 20, 3, 64), (2, 0, 3, 64), (2, 20, 0, 64), (2, 20, 3, 0)])
@pytest.mark.parametrize("mask_dims", [0, 1, 2])
def test_nothing_in_nothing_out(shape: tuple[int, ...], mask_dims: int) -> None:
    groups = shape[1] // SIZE
    mask = torch.ones(shape[0], *[groups] * mask_dims, dtype=torch.bool) if mask_dims else None
    assert multi_stream_attention_fp8(*random_qkv(5, torch.float32, shape), SIZE, mask).shape == shape


# What is not seen, and what is not a number.


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k, v = random_qkv(6, torch.float32)
    q[0, SIZE : 2 * SIZE] = torch.nan
    out = multi_stream_attention_fp8(q, k, v, SIZE, random_mask(5))
    assert out.isfinite().all() and out[0, : SIZE // 2].any() and not out[0, SIZE : 2 * SIZE].any()


@pytest.mark.parametrize("name", ["existing", "pairs 0"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e6])
def test_what_nobody_sees_has_no_influence(poison: float, name: str) -> None:
    (q, k, v), mask = random_qkv(7, torch.float32), MASKS[name]()
    hidden = ~as_pairs(mask).any(1).repeat_interleave(SIZE, 1)
    expected = multi_stream_attention_fp8(q, k, v, SIZE, mask)
    k[hidden], v[hidden] = poison, poison
    assert hidden.any() and torch.equal(multi_stream_attention_fp8(q, k, v, SIZE, mask), expected)


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
@pytest.mark.parametrize("which", [1, 2])
def test_a_nan_reaches_those_who_see_it_and_nobody_else(which: int, poison: float) -> None:
    given, mask = random_qkv(8, torch.float32), random_mask(6)
    expected = multi_stream_attention_fp8(*given, SIZE, mask)
    given[which][:, 2] = poison
    given[which][:, 3:SIZE] = 0  # what the poisoned token was is not the largest of its head
    found = multi_stream_attention_fp8(*given, SIZE, mask)
    reached = found.isnan().flatten(2).any(-1)
    assert torch.equal(reached, mask[:, :, 0].repeat_interleave(SIZE, 1)) and reached.any() and not reached.all()
    assert relative_error(found[~reached], expected[~reached].double()) < 0.1


def test_the_scale_of_a_head_is_its_largest_finite_magnitude() -> None:
    x = torch.tensor([1.0, -7.0, torch.inf, torch.nan, 3.0])[None, :, None, None]
    values, scale = quantize_heads(x, None)
    assert scale == 7 / 448 and values[0, 1] == -448 and values[0, 2:4].isnan().all()
    values, scale = quantize_heads(x, torch.tensor([[True, False, True, True, True]]))
    assert scale == 3 / 448 and values[0, 1] == 0
    assert quantize_heads(torch.zeros(1, 2, 3, 4), None)[1].tolist() == [[1.0, 1.0, 1.0]]


# How it is called.


@pytest.mark.parametrize("dims", [0, 2, 3])
def test_traces_whole_and_keeps_torchs_rules(dims: int) -> None:
    given, mask = random_qkv(9, torch.float32), {0: None, 2: existing(1), 3: random_mask(1)}[dims]
    expected = multi_stream_attention_fp8(*given, SIZE, mask)
    assert torch.equal(reference_attention(*given, SIZE, mask), expected)
    torch.compiler.reset()
    compiled = torch.compile(multi_stream_attention_fp8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given, SIZE, mask), expected)
    torch.library.opcheck(registered(), (*given, SIZE, mask))


def test_there_are_no_gradients() -> None:
    q, k, v = random_qkv(10, torch.float32)
    v.requires_grad_()
    with pytest.raises(ValueError, match=r"multi_stream_attention_fp8 has no gradients, but v requires one"):
        multi_stream_attention_fp8(q, k, v, SIZE)
    with torch.no_grad():
        assert not multi_stream_attention_fp8(q, k, v, SIZE).requires_grad


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_there_is_no_cpu_kernel(backend: Any) -> None:
    with pytest.raises(u4d_fast.BackendError, match=r"no CPU kernel|tensors are on cpu|not usable"):
        multi_stream_attention_fp8(*random_qkv(11, torch.float32), SIZE, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 20, 18)}, ValueError, r"q: expected \[B,T,heads,d\], got \[2,20,18\]"),
        ({"k": torch.zeros(2, 16, 3, 6)}, ValueError, r"k: expected \[2,20,3,6\] to match q .*, got \[2,16,3,6\]"),
        ({"q": torch.zeros(2, 20, 3, 6).double()}, TypeError, r"q: expected float32, bfloat16 or float16, got torch.f"),
        (
            {"v": torch.zeros(2, 20, 3, 6).half()},
            TypeError,
            r"v: expected torch\.float32 to match q, got torch\.float16",
        ),
        ({"group_size": 3}, ValueError, r"q: expected .* T a multiple of group_size 3, got \[2,20,3,6\]"),
        (
            {"group_mask": torch.ones(2, 6).bool()},
            ValueError,
            r"group_mask: expected \[2,5\] or \[2,5,5\] .* got \[2,6\]",
        ),
        ({"group_mask": torch.ones(2, GROUPS)}, TypeError, r"group_mask: expected bool, got torch\.float32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = random_qkv(12, torch.float32)
    with pytest.raises(error, match=message):
        multi_stream_attention_fp8(**{"q": q, "k": k, "v": v, "group_size": SIZE, "group_mask": None} | change)
