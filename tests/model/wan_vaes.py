"""Small Wan VAEs with random weights, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights that every run draws alike, without touching the generator of other tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def small_vae(**changes: Any) -> AutoencoderKLWan:
    """Wan's structure and strides with few channels."""
    with seeded(0):
        return AutoencoderKLWan(**{"base_dim": 4, "num_res_blocks": 1, **changes}).eval()


@torch.no_grad()
def restless_vae(**changes: Any) -> AutoencoderKLWan:
    """The same with no weight at the value that it was made with, such as 1 for all of a norm's."""
    vae = small_vae(**changes)
    with seeded(1):
        for weight in vae.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return vae


def relative(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((value - truth).norm() / truth.norm())
