"""Collapsed padding: n equal keys are one key whose score is raised by ln(n)."""

from __future__ import annotations

import math

import pytest
import torch
from model_samples import random_inputs, random_transformer, relative_error

from u4d.model.text import TextKeys, collapse_padding, split_log


@pytest.mark.parametrize("count", (1, 2, 3, 7, 64, 100, 487, 511, 512))
def test_split_log_weighs_as_much_as_the_keys_it_stands_for(count: int) -> None:
    assert split_log(count, torch.float32) == [math.log(count)]
    for dtype, tolerance in ((torch.bfloat16, 2e-4), (torch.float16, 2e-5)):
        scores = torch.tensor(split_log(count, dtype)).to(dtype).double()
        assert len(scores) <= 2
        assert float(scores.exp().sum()) == pytest.approx(count, rel=tolerance)


def test_no_padding_needs_no_key() -> None:
    assert split_log(0, torch.bfloat16) == []


def test_collapse_keeps_every_token_and_one_zero_row_each() -> None:
    text = torch.zeros(3, 9, 4)
    for clip, length in enumerate((2, 0, 5)):
        text[clip, :length] = torch.randn(length, 4, generator=torch.Generator().manual_seed(clip))
    prompt = collapse_padding(text)
    assert torch.equal(prompt.embeddings, text[:, :6])
    weights = prompt.bias.exp().sum(1)
    torch.testing.assert_close(weights, torch.full((3,), 9.0))
    assert prompt.bias[0].tolist() == pytest.approx([0, 0, math.log(7), -math.inf, -math.inf, -math.inf])


def test_a_zero_row_between_words_is_no_padding() -> None:
    text = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    text[0, 2] = 0
    prompt = collapse_padding(text)
    assert torch.equal(prompt.embeddings, text) and prompt.bias is None


def test_padding_weighs_right_under_autocast_too() -> None:
    model = random_transformer(text_length=512)
    with torch.autocast("cpu", torch.bfloat16):
        bias = model.null_prompt().bias
    assert bias.shape[1] == 3 and model.null_prompt().bias.shape[1] == 2
    weight = float(bias[0, 1:].bfloat16().double().exp().sum())
    assert weight == pytest.approx(model.config.text_length - 1, rel=1e-3)


@torch.no_grad()
def test_one_prompt_serves_a_batch() -> None:
    """Keys of one prompt are shared by all clips: nothing of the batch's size is kept."""
    model = random_transformer()
    latents, times, text = random_inputs(3)
    text = text[:1]
    keys = model.text_keys(text)
    assert keys.blocks[0][0].shape[1] == 1
    truth = model(latents, times, text.expand(3, -1, -1))
    assert relative_error(model(latents, times, keys), truth) < 1e-5


@torch.no_grad()
def test_keys_of_another_model_are_refused() -> None:
    latents, times, text = random_inputs()
    keys = random_transformer().text_keys(text)
    with pytest.raises(ValueError, match="text: expected keys of 2 blocks, got those of 1"):
        random_transformer()(latents, times, TextKeys(keys.blocks[:1]))


def test_gradients_reach_the_text_path_through_checkpointed_blocks() -> None:
    model = random_transformer().train()
    latents, times, text = random_inputs()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model(latents, times, text).square().sum().backward()
        gradients.append(model.condition_embedder.text_embedder.linear_1.weight.grad.clone())
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[1], gradients[0])
