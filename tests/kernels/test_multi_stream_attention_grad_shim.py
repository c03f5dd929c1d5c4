"""The gradient kernels of the attention on the CPU, through the emulation of Hopper's instructions, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from attention_on_shim import ORDERS, exact_lse, launch, mask_strides, plan_size
from group_masks import GROUPS, MASKS, as_pairs, random_mask, random_qkv
from torch import Tensor

from u4d_fast.reference import multi_stream_attention as reference_attention

OP = "multi_stream_attention_grad"
DIMS = (64, 128)


@dataclass(frozen=True)
class Gradients:
    """Of q, k and v, `[B,T,heads,d]`."""

    q: Tensor
    k: Tensor
    v: Tensor

    def equals(self, other: Gradients) -> bool:
        return all(torch.equal(getattr(self, x.name), getattr(other, x.name)) for x in fields(self))


@dataclass(frozen=True)
class Case:
    """The tensors that the kernel is given: the last two are what a forward pass gives."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, x.name) for x in fields(self)]


def make_case(seed: int, shape: tuple[int, int, int, int], size: int, mask: Tensor | None, factor: float = 1) -> Case:
    """Random bfloat16 tensors `[B,T,heads,d]`; q times a factor."""
    q, k, v = random_qkv(seed, torch.bfloat16, shape)
    q = factor * q
    grad = random_qkv(seed + 1000, torch.bfloat16, shape)[0]
    return Case(grad, q, k, v, *forward(q, k, v, size, mask))


def forward(q: Tensor, k: Tensor, v: Tensor, size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, rounded: out `[B,T,heads,d]` bfloat16 and lse `[B,heads,T]` float32, -inf where nothing is seen."""
    out = reference_attention(q.double(), k.double(), v.double(), size, mask)
    return out.bfloat16().contiguous(), exact_lse(q, k, size, mask).float()


def differentiate(case: Case, size: int, mask: Tensor | None = None, order: int = 0, seed: int = 1) -> Gradients:
    """Run the CUDA source on the CPU; outputs start as NaN, and each plan has a guard behind it."""
    batch, tokens, heads, dim = case.q.shape
    found = Gradients(*(torch.full((batch, tokens, heads, dim), torch.nan, dtype=torch.bfloat16) for _ in range(3)))
    groups, row = (1, tokens) if mask is None else (tokens // size, size)
    sizes = [batch * plan_size(groups, row, stride != 0) for stride in mask_strides(mask)[1:]]
    plans: list[Tensor | None] = [torch.full((size + 8,), -7, dtype=torch.int32) for size in sizes]
    facts = torch.full((batch, heads, tokens, 2), torch.nan)
    strides = [stride for x in (case.grad, case.q, case.k, case.v) for stride in x.stride()[:3]]
    masked = [size, mask, *mask_strides(mask)]
    written = [*plans, facts, found.q, found.k, found.v]
    assert launch(OP, [*case.tensors(), *case.q.shape, *strides, *masked, *written], order, seed) == (0, "")
    guards = [plan[size:] for plan, size in zip(plans, sizes, strict=True) if plan is not None]
    assert all((guard == -7).all() for guard in guards), "the kernel wrote past its plans"
    return found


def torchs_gradients(case: Case, dtype: torch.dtype, size: int, mask: Tensor | None) -> Gradients:
    leaves = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    return Gradients(*torch.autograd.grad(reference_attention(*leaves, size, mask), leaves, case.grad.to(dtype)))


def assert_right(case: Case, size: int, mask: Tensor | None, found: Gradients) -> None:
    exact = torchs_gradients(case, torch.float64, size, mask)
    plain = torchs_gradients(case, torch.bfloat16, size, mask)
    for field in fields(Gradients):
        truth = getattr(exact, field.name)
        error, plain_error = (getattr(x, field.name).double() - truth for x in (found, plain))
        assert error.abs().max() <= 2 * plain_error.abs().max() + 1e-3, field.name
        assert error.norm() <= 2 * plain_error.norm() + 1e-3 * truth.norm() + 1e-5, field.name
    assert_unseen_gets_zeros(size, mask, found)


def assert_unseen_gets_zeros(size: int, mask: Tensor | None, found: Gradients) -> None:
    pairs = as_pairs(mask)[: found.q.shape[0]]
    if mask is not None:
        assert not found.q[~pairs.any(2).repeat_interleave(size, 1)].any()
        assert not any(x[~pairs.any(1).repeat_interleave(size, 1)].any() for x in (found.k, found.v))


def in_both_orders(case: Case, size: int, mask: Tensor | None) -> Gradients:
    """The kernels' answer, which the order of the threads must not change by a bit."""
    first, second = (differentiate(case, size, mask, order) for order in ORDERS)
    assert first.equals(second)
    return first


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name: str, dim: int) -> None:
    mask = MASKS[name]()
    case = make_case(1, (2, GROUPS * 37, 1, dim), 37, mask)
    assert_right(case, 37, mask, in_both_orders(case, 37, mask))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dim"), [(1, 128), (100, 64)])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_and_group_size(name: str, size: int, dim: int) -> None:
    """Groups of one token, and groups that are longer than most tiles."""
    mask = MASKS[name]()
    case = make_case(2, (2, GROUPS * size, 1, dim), size, mask)
    assert_right(case, size, mask, differentiate(case, size, mask))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tokens", [1, 64, 97, 128, 129, 200, 385])
def test_any_number_of_tokens(tokens: int, dim: int) -> None:
    case = make_case(3, (1, tokens, 2, dim), tokens, None)
    assert_right(case, tokens, None, differentiate(case, tokens, order=1))


@pytest.mark.parametrize("dims", [(0, 1), (0, 2), (1, 2)])
def test_masks_with_strides_of_zero(dims: tuple[int, int]) -> None:
    """Each of the two plans has one row for all where its rows are one in memory."""
    shape = [2, GROUPS, GROUPS]
    for dim in dims:
        shape[dim] = 1
    mask = (torch.arange(math.prod(shape)) % 3 != 1).view(shape).expand(2, GROUPS, GROUPS)
    case = make_case(4, (2, GROUPS * 40, 1, 64), 40, mask)
    assert_right(case, 40, mask, differentiate(case, 40, mask))


@pytest.mark.parametrize("dim", DIMS)
def test_strided_inputs(dim: int) -> None:
    mask = random_mask(5)
    case = make_case(5, (2, GROUPS * 30, 2, dim), 30, mask)
    q, k = torch.stack((case.q, case.k), 3).unbind(3)  # side by side
    grad, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.grad, case.v))
    assert not any(x.is_contiguous() for x in (q, k, v, grad))
    strided = replace(case, q=q, k=k, v=v, grad=grad)
    assert differentiate(strided, 30, mask).equals(differentiate(case, 30, mask))


def test_the_order_in_which_copies_come_changes_nothing() -> None:
    mask = random_mask(1)
    case = make_case(6, (2, GROUPS * 30, 1, 128), 30, mask)
    results = [differentiate(case, 30, mask, seed % 2, seed) for seed in range(5)]
    assert all(results[0].equals(other) for other in results)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["existing", "pairs 0", "pairs 1", "strided"])
def test_what_is_not_seen_has_no_influence(name: str, dim: int) -> None:
    """Keys and values that nobody sees, and all rows of queries that see nothing."""
    mask = MASKS[name]()
    assert mask is not None
    case = make_case(7, (2, GROUPS * 25, 1, dim), 25, mask)
    hidden, blind = (~as_pairs(mask).any(way).repeat_interleave(25, 1) for way in (1, 2))
    assert hidden.any()
    expected = differentiate(case, 25, mask)
    q, k, v, grad, out = (x.clone() for x in (case.q, case.k, case.v, case.grad, case.out))
    k[hidden], v[hidden] = torch.nan, torch.inf
    q[blind], grad[blind], out[blind] = torch.nan, torch.inf, torch.nan
    assert differentiate(Case(grad, q, k, v, out, case.lse), 25, mask).equals(expected)
    assert not any(x.isnan().any() for x in (expected.q, expected.k, expected.v))


@pytest.mark.parametrize("name", ["grad", "q"])
def test_a_nan_reaches_what_the_query_sees_and_nothing_else(name: str) -> None:
    mask = random_mask(6)
    case = make_case(8, (2, GROUPS * 20, 1, 64), 20, mask)
    getattr(case, name)[:, 27] = torch.nan  # a query of group 1, which sees nothing in clip 0
    found = differentiate(case, 20, mask)
    reached = found.k.isnan().flatten(2).any(-1)
    assert torch.equal(reached, mask[:, 1].repeat_interleave(20, 1)) and reached.any() and not reached[0].any()
    queries = found.q.isnan().flatten(2).any(-1)
    assert queries[1, 27] and queries.sum() == 1


@pytest.mark.parametrize("factor", [0, 30])
def test_scores_of_any_size(factor: float) -> None:
    case = make_case(9, (1, 300, 1, 64), 300, None, factor)
    assert_right(case, 300, None, differentiate(case, 300))


def test_nothing_to_do_and_what_is_refused() -> None:
    full = make_case(10, (1, 12, 1, 64), 4, None)
    for cut in (lambda x: x[:0], lambda x: x[:, :0], lambda x: x[:, :, :0]):
        differentiate(Case(*(cut(x) for x in full.tensors()[:5]), full.lse), 4)
    scratch: list[Tensor | None] = [torch.empty(12, 64) for _ in range(6)]
    strides = [768, 64, 64]
    assert launch(OP, [*full.tensors(), 1, 12, 1, 32, *strides * 4, 4, None, 0, 0, 0, *scratch])[0] == -1
    odd = torch.zeros(12 * 64 + 8, dtype=torch.bfloat16)[1 : 12 * 64 + 1].view(1, 12, 1, 64)  # 2-byte aligned
    refused = replace(full, v=odd).tensors()
    assert launch(OP, [*refused, 1, 12, 1, 64, *strides * 4, 4, None, 0, 0, 0, *scratch])[0] == 1
