"""The fp8 attention kernels on a Hopper GPU, against their specification and against float64."""

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
from u4d_fast.ops.multi_stream_attention_fp8 import attention_fp8_with_lse, multi_stream_attention_fp8
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as exact_attention
from u4d_fast.reference.multi_stream_attention_fp8 import multi_stream_attention_fp8 as reference_attention
from u4d_fast.reference.multi_stream_attention_fp8 import quantize, seen_tokens

pytestmark = pytest.mark.gpu

# The tensor cores keep about 14 bits of the sum over a tile's 128 keys, and cut the rest off. In an emulation of that
# results of many similar values become 0.07 % smaller; without sums of tiles in float32 they would by up to 25 %.
CORES_LOSE = 2e-3


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    if reason := backends.unavailable("multi_stream_attention_fp8", "cuda", torch.cuda.current_device()):
        pytest.skip(reason)


def exact_lse(q: Tensor, k: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """In float64, head by head: `[B,heads,T]`."""
    heads, dim = q.shape[2:]
    seen = visible_keys(q, size, mask)
    lse = [
        (q[:, :, head] @ k[:, :, head].mT / math.sqrt(dim)).masked_fill(~seen, -math.inf).logsumexp(-1)
        for head in range(heads)
    ]
    return torch.stack(lse, 1)


def check(given: list[Tensor], size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Against exact attention of the quantised inputs: the error is at most twice that of the specification."""
    q, k, v = given
    out, lse = attention_fp8_with_lse(q, k, v, size, mask)
    codes = quantize(q, k, v, seen_tokens(mask, size))
    rounded = [
        (codes.q * codes.q_scale[..., None]).double(),
        (codes.k * codes.k_scale[:, None, :, None]).double(),
        (codes.v * codes.v_scale[:, None, :, None]).double(),
    ]
    exact = exact_attention(*rounded, size, mask)
    plain = reference_attention(q, k, v, size, mask).double() - exact
    error = out.double() - exact
    assert (tile_maxima(error) <= 2 * tile_maxima(plain).amax() + CORES_LOSE * exact.abs().amax()).all()
    assert error.norm() <= 2 * plain.norm() + CORES_LOSE * exact.norm()
    wanted = exact_lse(rounded[0], rounded[1], size, mask)
    blind = wanted == -math.inf
    assert (lse[blind] == -math.inf).all() and not out.transpose(1, 2)[blind].any()
    torch.testing.assert_close(lse[~blind].double(), wanted[~blind], rtol=1e-3, atol=1e-3)
    return out, lse


class TestForward(ForwardTests):
    def run(self, given: list[Tensor], size: int, mask: Tensor | None) -> tuple[Tensor, ...]:
        q, k, v = given
        return attention_fp8_with_lse(q, k, v, size, mask)

    def check(self, given: list[Tensor], size: int, mask: Tensor | None) -> None:
        check(given, size, mask)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 127, 128, 129, 143, 256, 257, 400, 1000])
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_any_number_of_tokens(tokens: int, dim: int) -> None:
    check(random_heads(2, 1, tokens, 3, dim), tokens, None)


@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("outputs_start_as_nan")
def test_a_full_clip(masked: bool, shift: float) -> None:
    """56 groups of 300 tokens, as in wan-1.3b, with one head. With a mean in the values the sums over keys grow to the
    end: what the tensor cores do not keep of them would show."""
    q, k, v = random_heads(4, 1, 56 * 300, 1, 128)
    mask = own_stream(4, 14) if masked else None
    out, _ = check([q, k, v + shift], 300, mask)
    exact = exact_attention(q.double(), k.double(), (v + shift).double(), 300, mask)
    lost = 1 - (out.double() * exact).sum() / exact.square().sum()
    assert abs(lost) < 0.005, f"results are {100 * lost:.2f} % too small"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("which", [1, 2])
def test_a_nan_reaches_those_who_see_it_and_nobody_else(which: int, dim: int) -> None:
    """Keys of other groups stand on both sides of it in its tile, since 70 is no multiple of 16."""
    given, mask = random_heads(8, BATCH, GROUPS * 70, 1, dim), random_mask(6)
    given[which][:, 205] = torch.nan
    reached = attention_fp8_with_lse(*given, 70, mask)[0].isnan().flatten(2).any(-1).cpu()
    assert torch.equal(reached, mask[:, :, 2].repeat_interleave(70, 1)) and reached.any() and not reached.all()


@pytest.mark.parametrize("mask_device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["existing", "pairs 0"])
def test_nothing_is_waited_for(name: str, mask_device: str) -> None:
    given, mask = random_heads(12, BATCH, GROUPS * 30, 2, 64), MASKS[name]()
    assert mask is not None
    mask = mask.to(mask_device)
    multi_stream_attention_fp8(*given, 30, mask)
    with waiting_is_an_error():
        multi_stream_attention_fp8(*given, 30, mask)


# The choice.


@pytest.mark.parametrize("masked", [False, True])
def test_auto_takes_the_kernel(masked: bool) -> None:
    given, mask = random_heads(13, BATCH, GROUPS * 30, 2, 64), existing(1) if masked else None
    by_kernel = attention_fp8_with_lse(*given, 30, mask)[0]
    assert torch.equal(multi_stream_attention_fp8(*given, 30, mask), by_kernel)
    by_reference = reference_attention(*given, 30, mask)
    assert torch.equal(multi_stream_attention_fp8(*given, 30, mask, backend="reference"), by_reference)
    torch.compiler.reset()
    compiled = torch.compile(multi_stream_attention_fp8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given, 30, None if mask is None else mask.cuda()), by_kernel)


def test_what_the_kernel_does_not_take() -> None:
    other_dim, single = random_heads(14, 1, 20, 1, 32), [x.float() for x in random_heads(14, 1, 20, 1, 64)]
    for given, reason in ((other_dim, "head dims 64 and 128, got 32"), (single, "bfloat16, got torch.float32")):
        with pytest.raises(u4d_fast.BackendError, match=reason):
            multi_stream_attention_fp8(*given, 4, backend="cuda")
        assert torch.equal(multi_stream_attention_fp8(*given, 4), reference_attention(*given, 4))
