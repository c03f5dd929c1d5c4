"""A small model with adapters that matter, and its output, for the tests of LoRA."""

from __future__ import annotations

import torch
from model_samples import random_inputs, random_transformer
from torch import Tensor

from u4d.model.lora import LoRAConfig, add_lora, lora_parameters
from u4d.model.transformer import Transformer

CONFIG = LoRAConfig(rank=3, alpha=4.5)
INPUTS = random_inputs(batch=2)


@torch.no_grad()
def randomise_adapters(model: Transformer, seed: int = 1) -> Transformer:
    """Give both factors values that matter; B is zero in fresh adapters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model).values():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(seed: int = 0, config: LoRAConfig = CONFIG) -> Transformer:
    model = random_transformer(seed)
    add_lora(model, config)
    return randomise_adapters(model)


@torch.no_grad()
def output(model: Transformer, dtype: torch.dtype = torch.float32) -> Tensor:
    latents, times, text = INPUTS
    result: Tensor = model(latents.to(dtype), times, text.to(dtype))
    return result
