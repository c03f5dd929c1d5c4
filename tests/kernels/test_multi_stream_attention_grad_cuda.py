"""The gradient kernels of the attention on a Hopper GPU against float64; torch in bfloat16 is the measure of error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_on_gpu import (
    DIMS,
    CallTests,
    assert_same,
    random_heads,
    tile_maxima,
    visible_keys,
    waiting_is_an_error,
)
from group_masks import BATCH, GROUPS, MASKS, as_pairs, own_stream, random_mask
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast import multi_stream_attention
from u4d_fast.attention_grads import attention_grads
from u4d_fast.ops.multi_stream_attention import attention_with_lse
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as reference_attention

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    if reason := backends.unavailable("multi_stream_attention_grad", "cuda", torch.cuda.current_device()):
        pytest.skip(reason)


def cuda_case(seed: int, batch: int, tokens: int, heads: int, dim: int) -> list[Tensor]:
    """The gradient of the attention, and q, k, v: `[B,T,heads,d]` each."""
    grad = random_heads(seed + 1000, batch, tokens, heads, dim)[0]
    return [grad, *random_heads(seed, batch, tokens, heads, dim)]


def by_kernel(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, size: int, mask: Tensor | None) -> tuple[Tensor, ...]:
    return attention_grads(grad, q, k, v, *attention_with_lse(q, k, v, size, mask), size, mask)


def exact_grads(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, size: int, mask: Tensor | None) -> list[Tensor]:
    """In float64, head by head, by the formulas of the kernel's contract."""
    seen = visible_keys(q, size, mask)
    scale = 1 / math.sqrt(q.shape[-1])
    grads = [torch.empty_like(x, dtype=torch.float64) for x in (q, k, v)]
    for head in range(q.shape[2]):
        g, a, b, c = (x[:, :, head].double() for x in (grad, q, k, v))
        weights = torch.softmax((a @ b.mT * scale).masked_fill(~seen, -math.inf), -1)
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0)
        slopes = g @ c.mT
        slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) * scale
        grads[0][:, :, head], grads[1][:, :, head], grads[2][:, :, head] = slopes @ b, slopes.mT @ a, weights.mT @ g
    return grads


def torchs_grads(grad: Tensor, *qkv: Tensor, size: int, mask: Tensor | None) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    return torch.autograd.grad(reference_attention(*leaves, size, mask), leaves, grad)


def check(case: list[Tensor], size: int, mask: Tensor | None) -> tuple[Tensor, ...]:
    found = by_kernel(case[0], case[1], case[2], case[3], size, mask)
    plain = torchs_grads(*case, size=size, mask=mask)
    floor = torch.finfo(torch.bfloat16).eps / 4
    for ours, theirs, exact in zip(found, plain, exact_grads(*case, size, mask), strict=True):
        error, plain_error = ours.double() - exact, theirs.double() - exact
        assert (tile_maxima(error) <= 2 * tile_maxima(plain_error).amax() + floor * exact.abs().amax()).all()
        assert error.norm() <= 2 * plain_error.norm() + floor * exact.norm()
    if mask is not None:
        unseen, blind = (~as_given(mask).any(way).repeat_interleave(size, 1).cuda() for way in (1, 2))
        assert not found[0][blind].any() and not found[1][unseen].any() and not found[2][unseen].any()
    return found


def as_given(mask: Tensor) -> Tensor:
    return mask if mask.ndim == 3 else mask[:, None].expand(-1, mask.shape[1], -1)


# Values.


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("size", [300, 48, 17, 1])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_every_mask_and_group_size(name: str, size: int, dim: int) -> None:
    check(cuda_case(1, BATCH, GROUPS * size, 2, dim), size, MASKS[name]())


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tokens", [2, 63, 64, 65, 95, 96, 97, 127, 128, 129, 192, 193, 256, 1000])
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_any_number_of_tokens(tokens: int, dim: int) -> None:
    check(cuda_case(2, 1, tokens, 3, dim), tokens, None)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_more_tiles_than_multiprocessors(dim: int) -> None:
    """Each block of the persistent grids works on several tiles, some of which see nothing."""
    groups, size = 8, 300
    mask = torch.rand(3, groups, groups, generator=torch.Generator().manual_seed(3)) < 0.3
    mask[0, :4], mask[2, :, 7] = False, False
    check(cuda_case(3, 3, groups * size, 12, dim), size, mask)


@pytest.mark.usefixtures("outputs_start_as_nan")
def test_streams_of_a_full_clip() -> None:
    """56 groups of 300 tokens, as in wan-1.3b, with fewer heads."""
    check(cuda_case(4, 1, 56 * 300, 1, 128), 300, own_stream(4, 14))


@pytest.mark.parametrize("factor", [0.0, 30.0])
def test_scores_of_any_size(factor: float) -> None:
    grad, q, k, v = cuda_case(5, 1, 500, 2, 128)
    check([grad, q * factor, k, v], 500, None)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
def test_strided_inputs(name: str, dim: int) -> None:
    (grad, q, k, v), mask = cuda_case(6, BATCH, GROUPS * 60, 2, dim), MASKS[name]()
    expected = by_kernel(grad, q, k, v, 60, mask)
    side_by_side = torch.stack((q, k), 3)
    grad_by_head, v_by_head = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, v))
    every_other = torch.stack((grad, grad), -1).flatten(-2)[..., ::2]  # can't be read in place
    odd_address = q.new_zeros(q.numel() + 1)[1:].view_as(q).copy_(q)
    for strided in (
        (grad_by_head, side_by_side[..., 0, :], side_by_side[..., 1, :], v_by_head),
        (every_other, odd_address, k, v),
    ):
        assert_same(by_kernel(*strided, 60, mask), expected)


# What is not seen.


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("size", [100, 300])
@pytest.mark.parametrize("name", ["existing", "pairs 0", "pairs 1"])
def test_what_is_not_seen_has_no_influence(name: str, size: int, dim: int) -> None:
    (grad, q, k, v), mask = cuda_case(7, BATCH, GROUPS * size, 2, dim), MASKS[name]()
    out, lse = attention_with_lse(q, k, v, size, mask)
    expected = attention_grads(grad, q, k, v, out, lse, size, mask)
    hidden, blind = (~as_pairs(mask).any(way).repeat_interleave(size, 1).cuda()[..., None, None] for way in (1, 2))
    assert hidden.any()
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf)
    q, grad, out = (
        q.masked_fill(blind, torch.nan),
        grad.masked_fill(blind, torch.inf),
        out.masked_fill(blind, torch.nan),
    )
    found = attention_grads(grad, q, k, v, out, lse, size, mask)
    assert_same(found, expected)


def test_a_nan_reaches_what_the_query_sees_and_nothing_else() -> None:
    (grad, q, k, v), mask = cuda_case(8, BATCH, GROUPS * 70, 1, 64), random_mask(6)
    grad[:, 75] = torch.nan  # of group 1, which sees nothing in clip 0
    grad_q, grad_k, _ = by_kernel(grad, q, k, v, 70, mask)
    reached = grad_k.isnan().flatten(2).any(-1).cpu()
    assert torch.equal(reached, mask[:, 1].repeat_interleave(70, 1)) and reached.any()
    assert grad_q.isnan().flatten(2).any(-1).sum() == 1


# How it is called.


class TestCall(CallTests):
    def make(self, seed: int, batch: int, tokens: int, heads: int, dim: int) -> list[Tensor]:
        return cuda_case(seed, batch, tokens, heads, dim)

    def run(self, given: list[Tensor], size: int, mask: Tensor | None) -> tuple[Tensor, ...]:
        grad, q, k, v = given
        return by_kernel(grad, q, k, v, size, mask)


# Through autograd.


def autograd(call: Any, case: list[Tensor], mask: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in case[1:]]
    return torch.autograd.grad(call(*leaves, 30, mask, **options), leaves, case[0])


@pytest.mark.parametrize("mask_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
def test_autograd_and_compiled_graphs_take_the_kernels(name: str, mask_device: str) -> None:
    case, mask = cuda_case(12, BATCH, GROUPS * 30, 2, 64), MASKS[name]()
    mask = None if mask is None else mask.to(mask_device)
    expected = by_kernel(*case, 30, mask)
    torch.compiler.reset()
    compiled = torch.compile(multi_stream_attention, fullgraph=True, backend="aot_eager")
    for call in (multi_stream_attention, compiled):
        for backend in ("cuda",) if mask is None else ("cuda", "auto"):
            found = autograd(call, case, mask, backend=backend)
            assert_same(found, expected)
    by_reference = autograd(multi_stream_attention, case, mask, backend="reference")
    plain = torchs_grads(*case, size=30, mask=mask)
    for a, b in zip(by_reference, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=2e-2)


@pytest.mark.parametrize("mask_device", ["cpu", "cuda"])
def test_nothing_is_waited_for(mask_device: str) -> None:
    case, mask = cuda_case(13, BATCH, GROUPS * 30, 2, 64), random_mask(0).to(mask_device)
    autograd(multi_stream_attention, case, mask)
    with waiting_is_an_error():
        autograd(multi_stream_attention, case, mask)


def test_other_precisions_differentiate_the_reference() -> None:
    case, mask = [x.float() for x in cuda_case(14, BATCH, GROUPS * 30, 1, 64)], random_mask(5)
    found = autograd(multi_stream_attention, case, mask)
    for ours, exact in zip(found, exact_grads(*case, 30, mask), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=1e-2)
