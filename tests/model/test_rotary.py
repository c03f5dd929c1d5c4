"""Rotary positions against diffusers and by their law."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from u4d.model.rotary import rotary_table
from u4d_fast.reference.qk_norm_rope import rotate


@pytest.mark.parametrize("head_dim", (12, 20, 64, 128))
def test_rotary_table_equals_diffusers(head_dim: int) -> None:
    frames, rows, columns = 14, 15, 20
    wan = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    truth_cos, truth_sin = wan(torch.zeros(1, 16, frames, 2 * rows, 2 * columns))
    cos, sin = rotary_table(frames, rows, columns, head_dim, torch.device("cpu"))
    torch.testing.assert_close(cos, truth_cos[0, :, 0, 0::2].float())
    torch.testing.assert_close(sin, truth_sin[0, :, 0, 1::2].float())


def test_tables_are_made_once_and_serve_training_after_inference() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        first = rotary_table(2, 3, 4, 20, device)
    second = rotary_table(2, 3, 4, 20, device)
    assert first[0] is second[0] and not second[0].is_inference()
    with FakeTensorMode():
        fake = rotary_table(2, 3, 4, 20, device)
    assert isinstance(fake[0], FakeTensor) and rotary_table(2, 3, 4, 20, device)[0] is first[0]
    traced = torch.compile(lambda: rotary_table(2, 3, 4, 20, device)[0] + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(), first[0] + 1)


def test_rotated_products_depend_on_the_offset_alone() -> None:
    """A rotation by position keeps lengths, and q at p times k at p' is a function of p - p'."""
    frames, rows, columns = 4, 3, 5
    table = rotary_table(frames, rows, columns, 20, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 20, generator=generator)
    tokens = frames * rows * columns

    def everywhere(vector: Tensor) -> Tensor:
        return rotate(vector.expand(1, 1, tokens, 1, -1), *table)[0, 0, :, 0]

    q, k = everywhere(query), everywhere(key)
    torch.testing.assert_close(q.norm(dim=-1), query.norm().expand(tokens))
    products = (q @ k.T).reshape(frames, rows, columns, frames, rows, columns)
    torch.testing.assert_close(products[:-1, :-1, :-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:, 1:, 1:])
    assert (products[0, 0, 0] - products[0, 0, 0, 0, 0, 0]).abs().max() > 0.1
