"""The attention kernel on a Hopper GPU against float64, with torch's attention in bfloat16 as the measure of error."""

from __future__ import annotations

import math

import pytest
import torch
from attention_on_gpu import (
    DIMS,
    ForwardTests,
    random_heads,
    tile_maxima,
    visible_keys,
    waiting_is_an_error,
)
from group_masks import BATCH, GROUPS, MASKS, existing, own_stream, random_mask
from torch import Tensor

import u4d_fast
from u4d_fast import backend as backends
from u4d_fast import multi_stream_attention
from u4d_fast.ops.multi_stream_attention import DENSE_BY_KERNEL, attention_with_lse
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as reference_attention

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    if reason := backends.unavailable("multi_stream_attention", "cuda", torch.cuda.current_device()):
        pytest.skip(reason)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, head by head: out `[B,T,heads,d]`, lse `[B,heads,T]`."""
    batch, tokens, heads, dim = q.shape
    seen = visible_keys(q, size, mask)
    out, lse = torch.empty_like(q, dtype=torch.float64), torch.empty(batch, heads, tokens, dtype=torch.float64).cuda()
    for head in range(heads):
        scores = q[:, :, head].double() @ k[:, :, head].double().mT / math.sqrt(dim)
        scores = scores.masked_fill(~seen, -math.inf)
        lse[:, head] = scores.logsumexp(-1)
        weights = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0)
        out[:, :, head] = weights @ v[:, :, head].double()
    return out, lse


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


class TestForward(ForwardTests):
    def run(self, given: list[Tensor], size: int, mask: Tensor | None) -> tuple[Tensor, ...]:
        q, k, v = given
        return attention_with_lse(q, k, v, size, mask)

    def check(self, given: list[Tensor], size: int, mask: Tensor | None) -> None:
        check(given, size, mask)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 175, 176, 177, 352, 353, 1000])
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_any_number_of_tokens(tokens: int, dim: int) -> None:
    check(random_heads(2, 1, tokens, 3, dim), tokens, None)


@pytest.mark.usefixtures("outputs_start_as_nan")
def test_streams_of_a_full_clip() -> None:
    """56 groups of 300 tokens, as in wan-1.3b, with fewer heads."""
    check(random_heads(4, 1, 56 * 300, 1, 128), 300, own_stream(4, 14))


def test_a_nan_reaches_those_who_see_it_and_nobody_else() -> None:
    (q, k, v), mask = random_heads(8, BATCH, GROUPS * 70, 1, 64), random_mask(6)
    v[:, :70] = torch.nan
    reached = attention_with_lse(q, k, v, 70, mask)[0].isnan().flatten(2).any(-1).cpu()
    assert torch.equal(reached, mask[:, :, 0].repeat_interleave(70, 1)) and reached.any() and not reached.all()


@pytest.mark.parametrize("mask_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["existing", "pairs 0"])
def test_nothing_is_waited_for(name: str, mask_device: str) -> None:
    given, mask = random_heads(12, BATCH, GROUPS * 30, 2, 64), MASKS[name]()
    assert mask is not None
    mask = mask.to(mask_device)
    multi_stream_attention(*given, 30, mask)
    with waiting_is_an_error():
        multi_stream_attention(*given, 30, mask)


# The choice.


def test_auto_takes_the_kernel_for_masks() -> None:
    given, mask = random_heads(13, BATCH, GROUPS * 30, 2, 64), existing(1)
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
    other_dim, single = random_heads(14, 1, 20, 1, 32), [x.float() for x in random_heads(14, 1, 20, 1, 64)]
    for given, reason in ((other_dim, "head dims 64 and 128, got 32"), (single, "bfloat16, got torch.float32")):
        mask = torch.ones(1, 5, dtype=torch.bool)
        with pytest.raises(u4d_fast.BackendError, match=reason):
            multi_stream_attention(*given, 4, mask, backend="cuda")
        assert torch.equal(multi_stream_attention(*given, 4, mask), reference_attention(*given, 4, mask))


@pytest.mark.parametrize("backend", ["auto", "cuda", "reference"])
@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
def test_compiled_graphs_carry_the_choice(name: str, backend: backends.Backend) -> None:
    given, mask = random_heads(16, BATCH, GROUPS * 30, 2, 64), MASKS[name]()
    torch.compiler.reset()
    compiled = torch.compile(multi_stream_attention, fullgraph=True, backend="aot_eager")
    found = compiled(*given, 30, None if mask is None else mask.cuda(), backend=backend)
    assert torch.equal(found, multi_stream_attention(*given, 30, mask, backend=backend))
