"""The attention kernel on a Hopper GPU against float64, with torch's attention in bfloat16 as the measure of error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from group_masks import BATCH, GROUPS, MASKS, as_pairs, existing, own_stream, random_mask, random_qkv
from torch import Tensor

import u4d_fast
from u4d_fast import backend as backends
from u4d_fast import multi_stream_attention
from u4d_fast.ops.multi_stream_attention import DENSE_BY_KERNEL, attention_with_lse
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as reference_attention

pytestmark = pytest.mark.gpu
DIMS = (64, 128)
TILE_ROWS = 128


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    if reason := backends.unavailable("multi_stream_attention", "cuda", torch.cuda.current_device()):
        pytest.skip(reason)


@pytest.fixture
def outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel does not write stays NaN, and what it reads of its plan without having written it is far off."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else -(10**8))

    monkeypatch.setattr(torch, "empty", filled)


def cuda_qkv(seed: int, batch: int, tokens: int, heads: int, dim: int) -> list[Tensor]:
    return [x.cuda() for x in random_qkv(seed, torch.bfloat16, (batch, tokens, heads, dim))]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, head by head: out `[B,T,heads,d]`, lse `[B,heads,T]`."""
    batch, tokens, heads, dim = q.shape
    seen = torch.ones(batch, 1, tokens, dtype=torch.bool, device=q.device)
    if mask is not None:
        pairs = mask if mask.ndim == 3 else mask[:, None]
        seen = pairs.to(q.device).repeat_interleave(size, 2)
        seen = seen.repeat_interleave(size, 1) if mask.ndim == 3 else seen
    out, lse = torch.empty_like(q, dtype=torch.float64), torch.empty(batch, heads, tokens, dtype=torch.float64).cuda()
    for head in range(heads):
        scores = q[:, :, head].double() @ k[:, :, head].double().mT / math.sqrt(dim)
        scores = scores.masked_fill(~seen, -math.inf)
        lse[:, head] = scores.logsumexp(-1)
        weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0)
        out[:, :, head] = weights @ v[:, :, head].double()
    return out, lse


def tile_maxima(error: Tensor) -> Tensor:
    """The largest error of each tile of 128 queries of a head."""
    return torch.stack([tile.abs().amax((1, 3)) for tile in error.split(TILE_ROWS, 1)], 1)


def check(given: list[Tensor], size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = attention_with_lse(given[0], given[1], given[2], size, mask)
    exact, exact_lse = exact_attention(*given, size, mask)
    plain = reference_attention(*given, size, mask)
    error, plain_error = out.double() - exact, plain.double() - exact
    floor = torch.finfo(torch.bfloat16).eps / 4
    assert (tile_maxima(error) <= 2 * tile_maxima(plain_error).amax() + floor).all()
    assert error.norm() <= 2 * plain_error.norm() + floor * exact.norm()
    blind = exact_lse == -math.inf
    assert (lse[blind] == -math.inf).all() and not out.transpose(1, 2)[blind].any()
    torch.testing.assert_close(lse[~blind].double(), exact_lse[~blind], rtol=1e-4, atol=1e-4)
    return out, lse


# Values.


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("size", [300, 48, 17, 1])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_every_mask_and_group_size(name: str, size: int, dim: int) -> None:
    check(cuda_qkv(1, BATCH, GROUPS * size, 2, dim), size, MASKS[name]())


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 175, 176, 177, 352, 353, 1000])
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_any_number_of_tokens(tokens: int, dim: int) -> None:
    check(cuda_qkv(2, 1, tokens, 3, dim), tokens, None)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_more_tiles_than_multiprocessors(dim: int) -> None:
    """Each block of the persistent grid works on several tiles, some of which see nothing."""
    groups, size = 8, 300
    mask = torch.rand(3, groups, groups, generator=torch.Generator().manual_seed(3)) < 0.3
    mask[0, :4], mask[2, 7] = False, False
    check(cuda_qkv(3, 3, groups * size, 12, dim), size, mask)


@pytest.mark.usefixtures("outputs_start_as_nan")
def test_streams_of_a_full_clip() -> None:
    """56 groups of 300 tokens, as in wan-1.3b, with fewer heads."""
    check(cuda_qkv(4, 1, 56 * 300, 1, 128), 300, own_stream(4, 14))


@pytest.mark.parametrize("factor", [0.0, 1.0, 30.0])
def test_scores_of_any_size(factor: float) -> None:
    q, k, v = cuda_qkv(5, 1, 500, 2, 128)
    check([q * factor, k, v], 500, None)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
def test_strided_inputs(name: str, dim: int) -> None:
    given, mask = cuda_qkv(6, BATCH, GROUPS * 60, 2, dim), MASKS[name]()
    expected = attention_with_lse(*given, 60, mask)
    q, k, v = given
    side_by_side = torch.stack((q, k), 3)
    by_head = v.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack((v, v), -1).flatten(-2)[..., ::2]  # can't be read in place
    odd_address = q.new_zeros(q.numel() + 1)[1:].view_as(q).copy_(q)
    for strided in (
        (side_by_side[..., 0, :], side_by_side[..., 1, :], by_head),
        (odd_address, k, every_other),
    ):
        found = attention_with_lse(*strided, 60, mask)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    shared = k[:1].expand(BATCH, -1, -1, -1)  # a stride of 0
    for a, b in zip(
        attention_with_lse(q, shared, v, 60, mask), attention_with_lse(q, shared.clone(), v, 60, mask), strict=True
    ):
        assert torch.equal(a, b)


# What is not seen.


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("size", [100, 300])
@pytest.mark.parametrize("name", ["existing", "pairs 0", "pairs 1"])
def test_what_nobody_sees_has_no_influence(name: str, size: int, dim: int) -> None:
    (q, k, v), mask = cuda_qkv(7, BATCH, GROUPS * size, 2, dim), MASKS[name]()
    expected = attention_with_lse(q, k, v, size, mask)
    hidden = ~as_pairs(mask).any(1).repeat_interleave(size, 1).cuda()
    assert hidden.any()
    k, v = k.masked_fill(hidden[..., None, None], torch.nan), v.masked_fill(hidden[..., None, None], torch.inf)
    found = attention_with_lse(q, k, v, size, mask)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_nan_reaches_those_who_see_it_and_nobody_else() -> None:
    (q, k, v), mask = cuda_qkv(8, BATCH, GROUPS * 70, 1, 64), random_mask(6)
    v[:, :70] = torch.nan
    reached = attention_with_lse(q, k, v, 70, mask)[0].isnan().flatten(2).any(-1).cpu()
    assert torch.equal(reached, mask[:, :, 0].repeat_interleave(70, 1)) and reached.any() and not reached.all()


# How it is called.


@pytest.mark.parametrize("dim", DIMS)
def test_the_same_call_gives_the_same_bits(dim: int) -> None:
    given, mask = cuda_qkv(9, BATCH, GROUPS * 300, 12, dim), random_mask(1)
    expected = attention_with_lse(*given, 300, mask)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(attention_with_lse(*given, 300, mask), expected, strict=True))


def test_runs_on_the_current_stream() -> None:
    given, mask = cuda_qkv(10, BATCH, GROUPS * 300, 4, 128), random_mask(2)
    expected = attention_with_lse(*given, 300, mask)
    later = [torch.zeros_like(x) for x in given]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream reads zeros
        for x, y in zip(later, given, strict=True):
            x.copy_(y)
        found = attention_with_lse(*later, 300, mask)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_captured_graph_follows_the_mask() -> None:
    given, mask = cuda_qkv(11, BATCH, GROUPS * 300, 2, 128), random_mask(3).cuda()
    attention_with_lse(*given, 300, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention_with_lse(*given, 300, mask)
    for seed in (3, 4):
        mask.copy_(random_mask(seed))
        graph.replay()
        expected = attention_with_lse(*given, 300, mask)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("mask_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["existing", "pairs 0"])
def test_nothing_is_waited_for(name: str, mask_device: str) -> None:
    given, mask = cuda_qkv(12, BATCH, GROUPS * 30, 2, 64), MASKS[name]()
    assert mask is not None
    mask = mask.to(mask_device)
    multi_stream_attention(*given, 30, mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        multi_stream_attention(*given, 30, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The choice.


def test_auto_takes_the_kernel_for_masks() -> None:
    given, mask = cuda_qkv(13, BATCH, GROUPS * 30, 2, 64), existing(1)
    assert torch.equal(multi_stream_attention(*given, 30, mask), attention_with_lse(*given, 30, mask)[0])
    by_reference = reference_attention(*given, 30, mask)
    assert torch.equal(multi_stream_attention(*given, 30, mask, backend="reference"), by_reference)
    leaves = [x.clone().requires_grad_() for x in given]
    assert torch.equal(multi_stream_attention(*leaves, 30, mask), attention_with_lse(*given, 30, mask)[0])
    assert torch.equal(multi_stream_attention(*leaves, 30), reference_attention(*given, 30))
    dense = attention_with_lse(*given, 30, None)[0] if DENSE_BY_KERNEL else reference_attention(*given, 30)
    assert torch.equal(multi_stream_attention(*given, 30), dense)
    assert u4d_fast.info()["ops"]["multi_stream_attention"]["cuda"] == {"backend": "cuda", "reason": ""}


def test_what_the_kernel_does_not_take() -> None:
    other_dim, single = cuda_qkv(14, 1, 20, 1, 32), [x.float() for x in cuda_qkv(14, 1, 20, 1, 64)]
    for given, reason in ((other_dim, "head dims 64 and 128, got 32"), (single, "bfloat16, got torch.float32")):
        mask = torch.ones(1, 5, dtype=torch.bool)
        with pytest.raises(u4d_fast.BackendError, match=reason):
            multi_stream_attention(*given, 4, mask, backend="cuda")
        assert torch.equal(multi_stream_attention(*given, 4, mask), reference_attention(*given, 4, mask))


@pytest.mark.parametrize("backend", ["auto", "cuda", "reference"])
@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
def test_compiled_graphs_carry_the_choice(name: str, backend: backends.Backend) -> None:
    given, mask = cuda_qkv(16, BATCH, GROUPS * 30, 2, 64), MASKS[name]()
    torch.compiler.reset()
    compiled = torch.compile(multi_stream_attention, fullgraph=True, backend="aot_eager")
    found = compiled(*given, 30, None if mask is None else mask.cuda(), backend=backend)
    assert torch.equal(found, multi_stream_attention(*given, 30, mask, backend=backend))
