"""Group-masked attention against a loop in float64; rotary positions against diffusers and by their law."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from u4d.model.attention import group_attention, rotary_table, rotate

BATCH, HEADS, GROUPS, SIZE, DIM = 2, 3, 5, 4, 6


def random_qkv(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(BATCH, HEADS, GROUPS * SIZE, DIM, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(3)
    )


def attention_by_loop(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query at a time, over the keys that it may see; mask `[B,G,G]`."""
    out = torch.zeros_like(q)
    for clip in range(q.shape[0]):
        for head in range(q.shape[1]):
            for query in range(q.shape[2]):
                visible = [key for key in range(q.shape[2]) if mask[clip, query // SIZE, key // SIZE]]
                if visible:
                    scores = k[clip, head, visible] @ q[clip, head, query] / math.sqrt(q.shape[-1])
                    out[clip, head, query] = torch.softmax(scores, 0) @ v[clip, head, visible]
    return out


def random_mask(seed: int) -> Tensor:
    """About half of the pairs, with rows and columns that are empty."""
    mask = torch.rand(BATCH, GROUPS, GROUPS, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0, 1], mask[1, :, 2] = False, False
    return mask


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop(seed: int) -> None:
    q, k, v = random_qkv(seed)
    mask = random_mask(seed)
    torch.testing.assert_close(group_attention(q, k, v, SIZE, mask), attention_by_loop(q, k, v, mask))


def test_existing_keys_equal_a_loop() -> None:
    q, k, v = random_qkv(3)
    exists = torch.tensor([[True, False, True, True, False], [False] * 5])
    truth = attention_by_loop(q, k, v, exists[:, None].expand(-1, GROUPS, -1))
    torch.testing.assert_close(group_attention(q, k, v, SIZE, exists), truth)


def test_no_mask_equals_a_loop() -> None:
    q, k, v = random_qkv(4)
    everything = torch.ones(BATCH, GROUPS, GROUPS, dtype=torch.bool)
    torch.testing.assert_close(group_attention(q, k, v, SIZE), attention_by_loop(q, k, v, everything))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_query_that_sees_nothing_gives_zeros_and_harmless_gradients(dtype: torch.dtype) -> None:
    q, k, v = (part.requires_grad_() for part in random_qkv(5, dtype))
    mask = random_mask(5)
    out = group_attention(q, k, v, SIZE, mask)
    assert out.dtype == dtype
    assert torch.equal(out[0, :, SIZE : 2 * SIZE], torch.zeros(HEADS, SIZE, DIM, dtype=dtype))
    out.square().sum().backward()
    for part in (q, k, v):
        assert part.grad.isfinite().all()
    assert torch.equal(q.grad[0, :, SIZE : 2 * SIZE], torch.zeros(HEADS, SIZE, DIM, dtype=dtype))


def test_what_nobody_sees_has_no_effect() -> None:
    q, k, v = random_qkv(6)
    mask = random_mask(6)
    hidden = slice(2 * SIZE, 3 * SIZE)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[1, :, hidden] += 5
    changed_v[1, :, hidden] += 5
    assert torch.equal(group_attention(q, changed_k, changed_v, SIZE, mask), group_attention(q, k, v, SIZE, mask))


@pytest.mark.parametrize(
    ("size", "mask"),
    [
        (3, None),
        (SIZE, torch.ones(BATCH, GROUPS + 1, dtype=torch.bool)),
        (SIZE, torch.ones(BATCH, GROUPS, GROUPS)),
        (SIZE, torch.ones(1, GROUPS, GROUPS, dtype=torch.bool)),
    ],
)
def test_wrong_masks_are_refused(size: int, mask: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"expected .* got"):
        group_attention(*random_qkv(), size, mask)


@pytest.mark.parametrize("head_dim", (12, 20, 64, 128))
def test_rotary_table_equals_diffusers(head_dim: int) -> None:
    frames, rows, columns = 14, 15, 20
    wan = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    truth_cos, truth_sin = wan(torch.zeros(1, 16, frames, 2 * rows, 2 * columns))
    cos, sin = rotary_table(frames, rows, columns, head_dim, torch.device("cpu"))
    torch.testing.assert_close(cos, truth_cos[0, :, 0, 0::2].float())
    torch.testing.assert_close(sin, truth_sin[0, :, 0, 1::2].float())


def test_rotated_products_depend_on_the_offset_alone() -> None:
    """A rotation by position keeps lengths, and q at p times k at p' is a function of p - p'."""
    frames, rows, columns = 4, 3, 5
    table = rotary_table(frames, rows, columns, 20, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 20, generator=generator)
    tokens = frames * rows * columns

    def everywhere(vector: Tensor) -> Tensor:
        return rotate(vector.expand(1, 1, tokens, 1, -1), table)[0, 0, :, 0]

    q, k = everywhere(query), everywhere(key)
    torch.testing.assert_close(q.norm(dim=-1), query.norm().expand(tokens))
    products = (q @ k.T).reshape(frames, rows, columns, frames, rows, columns)
    torch.testing.assert_close(products[:-1, :-1, :-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:, 1:, 1:])
    assert (products[0, 0, 0] - products[0, 0, 0, 0, 0, 0]).abs().max() > 0.1
