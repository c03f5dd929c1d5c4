"""The attention kernel for Hopper on the CPU, through the emulation of its instructions, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from attention_on_shim import ORDERS, bf16_qkv, exact_lse, launch, mask_strides, plan_size
from group_masks import GROUPS, MASKS, as_pairs, random_mask
from torch import Tensor

from u4d_fast.reference import multi_stream_attention as reference_attention

OP = "multi_stream_attention"
KEY_TILE = 176


@dataclass(frozen=True)
class Attended:
    """What the kernel gave: out `[B,T,heads,d]` bfloat16, lse `[B,heads,T]` float32."""

    out: Tensor
    lse: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, mask: Tensor | None = None, order: int = 0, seed: int = 1
) -> Attended:
    """Run the CUDA source on the CPU; outputs start as NaN, and the plan has a guard behind it."""
    batch, tokens, heads, dim = q.shape
    out = torch.full((batch, tokens, heads, dim), torch.nan, dtype=torch.bfloat16)
    lse = torch.full((batch, heads, tokens), torch.nan)
    size = plan_size(tokens // group_size, group_size, mask is not None and mask.ndim == 3)
    plan = torch.full((batch * size + 8,), -7, dtype=torch.int32)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    masked = [group_size, mask, *mask_strides(mask)]
    assert launch(OP, [q, k, v, *q.shape, *strides, *masked, plan, out, lse], order, seed) == (0, "")
    assert (plan[batch * size :] == -7).all(), "the kernel wrote past its plan"
    assert not lse.isnan().any() or q.isnan().any() or k.isnan().any()
    return Attended(out, lse)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, group_size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64: out `[B,T,heads,d]` and lse `[B,heads,T]`, -inf where nothing is seen."""
    out = reference_attention(q.double(), k.double(), v.double(), group_size, mask)
    return out, exact_lse(q, k, group_size, mask)


def assert_right(given: list[Tensor], group_size: int, mask: Tensor | None, attended: Attended) -> None:
    exact, lse = exact_attention(*given, group_size, mask)
    plain = reference_attention(*given, group_size, mask)
    error, plain_error = attended.out.double() - exact, plain.double() - exact
    assert error.abs().max() <= 2 * plain_error.abs().max() + 1e-3
    assert error.norm() <= 2 * plain_error.norm() + 1e-3 * exact.norm()
    blind = lse.isinf()
    assert torch.equal(attended.lse.isinf(), blind) and not (attended.lse[blind] > 0).any()
    assert not attended.out.transpose(1, 2)[blind].any()
    torch.testing.assert_close(attended.lse.double()[~blind], lse[~blind], rtol=1e-5, atol=1e-5)


def in_both_orders(given: list[Tensor], group_size: int, mask: Tensor | None) -> Attended:
    """The kernel's answer, which the order of the threads must not change by a bit."""
    first, second = (attend(*given, group_size, mask, order=order) for order in ORDERS)
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)
    return first


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name: str, dim: int) -> None:
    given, mask = bf16_qkv(1, 2, GROUPS * 37, 1, dim), MASKS[name]()
    assert_right(given, 37, mask, in_both_orders(given, 37, mask))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 127, 129, KEY_TILE, KEY_TILE + 1, 2 * KEY_TILE + 3])
def test_any_number_of_tokens(tokens: int, dim: int) -> None:
    given = bf16_qkv(2, 1, tokens, 2, dim)
    assert_right(given, tokens, None, in_both_orders(given, tokens, None))


@pytest.mark.parametrize("size", [1, 16, 140])
def test_any_group_size(size: int) -> None:
    """A group larger than a tile of queries, runs of groups longer than a tile of keys, and groups of one token."""
    given, mask = bf16_qkv(3, 2, GROUPS * size, 1, 64), random_mask(4)
    assert_right(given, size, mask, in_both_orders(given, size, mask))


@pytest.mark.parametrize("dim", [64, 128])
def test_strided_inputs(dim: int) -> None:
    given, mask = bf16_qkv(4, 2, GROUPS * 30, 2, dim), random_mask(5)
    expected = attend(*given, 30, mask)
    q, k, v = given
    packed = torch.stack((q, k), 3).unbind(3)  # q and k side by side
    by_head = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in (*packed, by_head))
    found = attend(*packed, by_head, 30, mask)
    assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)


def test_the_order_in_which_copies_come_changes_nothing() -> None:
    given, mask = bf16_qkv(5, 2, GROUPS * 50, 2, 128), random_mask(1)
    results = [attend(*given, 50, mask, order=seed % 2, seed=seed) for seed in range(6)]
    assert all(torch.equal(results[0].out, other.out) for other in results)
    assert all(torch.equal(results[0].lse, other.lse) for other in results)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["existing", "pairs 0", "pairs 1", "strided"])
def test_what_nobody_sees_has_no_influence(name: str, dim: int) -> None:
    given, mask = bf16_qkv(6, 2, GROUPS * 25, 1, dim), MASKS[name]()
    hidden = ~as_pairs(mask).any(1).repeat_interleave(25, 1)
    assert hidden.any()
    expected = attend(*given, 25, mask)
    q, k, v = (x.clone() for x in given)
    k[hidden], v[hidden] = torch.nan, torch.inf
    found = attend(q, k, v, 25, mask)
    assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)


def test_a_nan_reaches_those_who_see_it_and_nobody_else() -> None:
    (q, k, v), mask = bf16_qkv(7, 2, GROUPS * 20, 1, 64), random_mask(6)
    v[:, 7] = torch.nan
    reached = attend(q, k, v, 20, mask).out.isnan().flatten(2).any(-1)
    assert torch.equal(reached, mask[:, :, 0].repeat_interleave(20, 1)) and reached.any() and not reached.all()


@pytest.mark.parametrize("change", [lambda x: 30 * x, lambda x: 0 * x, lambda x: x + 100 * (x[..., :1] > 1)])
def test_scores_of_any_size(change: Callable[[Tensor], Tensor]) -> None:
    q, k, v = bf16_qkv(8, 1, 300, 1, 64)
    given = [change(q), k, v]
    assert_right(given, 300, None, attend(*given, 300))


def test_nothing_to_do_and_what_is_refused() -> None:
    given = bf16_qkv(9, 1, 12, 1, 64)
    for empty in ([x[:0] for x in given], [x[:, :0] for x in given], [x[:, :, :0] for x in given]):
        attend(*empty, 4)
    narrow = [x[..., :32] for x in given]
    sizes = [1, 12, 1, 32, *[768, 64, 64] * 3, 4]
    outputs = [torch.empty(100, dtype=torch.int32), torch.empty(12, 64), torch.empty(12)]
    assert launch(OP, [*narrow, *sizes, None, 0, 0, 0, *outputs])[0] == -1
    odd = torch.zeros(12 * 64 + 8, dtype=torch.bfloat16)[1 : 12 * 64 + 1].view(1, 12, 1, 64)  # 2-byte aligned
    sizes = [1, 12, 1, 64, *[768, 64, 64] * 3, 4]
    assert launch(OP, [given[0], odd, given[2], *sizes, None, 0, 0, 0, *outputs])[0] == 1
