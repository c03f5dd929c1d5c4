"""What attention over groups costs: calls, copies, memory, multiplications. Never more than what is seen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from group_masks import own_stream, random_qkv
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from u4d_fast import multi_stream_attention


class Calls(TorchDispatchMode):
    """Counts the operators below autograd, and keeps the number of elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count[str(func).split(".")[1]] += 1
        for result in out if isinstance(out, tuple | list) else [out]:
            self.largest = max(self.largest, result.numel() if isinstance(result, Tensor) else 0)
        return out

    @property
    def attentions(self) -> int:
        return self.count["_scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.parametrize(
    ("mask", "attentions", "copies"),
    [
        (None, 1, 0),
        (torch.tensor([[True, True, True, False]] * 3), 1, 0),  # the last stream is missing: a slice
        (torch.tensor([[True, False, True, True]] * 3), 1, 2),  # one in the middle: k and v are put together
        (torch.tensor([[True, False, True, False], [True, True, True, True], [True, False, True, False]]), 2, 6),
        (own_stream(4, 1, batch=3), 4, 1),  # slices, and the results are put together
        (torch.ones(3, 4, 4, dtype=torch.bool).tril(), 4, 1),
        (torch.zeros(3, 4, dtype=torch.bool), 0, 0),
    ],
    ids=["none", "last missing", "second missing", "two kinds of clips", "own stream", "causal", "nothing"],
)
def test_equal_clips_and_equal_rows_go_together(mask: Tensor | None, attentions: int, copies: int) -> None:
    given = random_qkv(15, torch.float32, (3, 8, 2, 4))
    with Calls() as calls:
        multi_stream_attention(*given, 2, mask)
    assert calls.attentions == attentions
    assert calls.count["cat"] == copies


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True, True]]), own_stream(4, 1)])
def test_nothing_of_the_size_of_a_token_mask_is_ever_stored(mask: Tensor | None) -> None:
    tokens = 256
    q, k, v = random_qkv(16, torch.float32, (1, tokens, 1, 4))
    v = torch.stack((v, v), -1).flatten(-2)[..., ::2]
    given = [x.requires_grad_() for x in (q, k, v)]
    with Calls() as calls:
        torch.autograd.grad(multi_stream_attention(*given, tokens // 4, mask).sum(), given)
    assert calls.attentions >= 1
    assert calls.largest <= q.numel() < tokens**2 // 16


def test_what_is_not_seen_costs_no_multiplication() -> None:
    streams, frames, size = 4, 2, 4
    given = random_qkv(17, torch.float32, (1, streams * frames * size, 2, 8))

    def cost(mask: Tensor | None) -> int:
        # Of torch's attentions on a CPU only this one is counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            multi_stream_attention(*given, size, mask)
        return counter.get_total_flops()

    full = cost(None)
    assert full == 2 * 2 * given[0].numel() * streams * frames * size
    assert cost(own_stream(streams, frames)) == full / 4
    no_depth = torch.tensor([[True] * 2 + [False] * 2 + [True] * 4])
    assert cost(no_depth) == full * 3 / 4
    assert cost(torch.zeros_like(no_depth)) == 0


@pytest.mark.parametrize("mask", [None, own_stream(4, 14)])
@pytest.mark.parametrize("on_meta", [False, True])
def test_on_the_meta_device_only_the_result_is_made(mask: Tensor | None, on_meta: bool) -> None:
    shape = (1, 16_800, 12, 128)
    given = [torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    if on_meta and mask is not None:
        mask = mask.to("meta")
    with Calls() as calls:
        out = multi_stream_attention(*given, 300, mask)
        grads = torch.autograd.grad(out.sum(), given)
    for result in (out, *grads):
        assert result.device.type == "meta" and result.shape == shape and result.dtype == torch.bfloat16
    assert calls.largest == out.numel()
