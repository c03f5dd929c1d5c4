"""Small random models of diffusers' Wan class and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from model.model_samples import randomise

FRAMES, HEIGHT, WIDTH = 3, 4, 6
TOKENS = FRAMES * (HEIGHT // 2) * (WIDTH // 2)
SIZES: dict[str, dict[str, Any]] = {
    "narrow": {},
    "head of 128": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 96},
    "no norm before text": {"num_attention_heads": 3, "attention_head_dim": 20, "cross_attn_norm": False},
    "image beside text": {"image_dim": 10, "added_kv_proj_dim": 24},
}


def small_wan(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Two layers of width 24 unless told otherwise; every parameter has an effect."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 40,
        "text_dim": 16,
        "freq_dim": 16,
    }
    return randomise(WanTransformer3DModel(**sizes | changes), seed).eval()


def wan_inputs(model: WanTransformer3DModel, per_token: bool = False, batch: int = 2) -> dict[str, Any]:
    """Arguments of a forward; with `per_token` every token has a noise level of its own, as in Wan 2.2."""
    generator = torch.Generator().manual_seed(1)
    image = model.config.image_dim is not None
    inputs = {
        "hidden_states": torch.randn(batch, 16, FRAMES, HEIGHT, WIDTH, generator=generator),
        "timestep": 1000 * torch.rand(batch, *([TOKENS] if per_token else []), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 512 if image else 5, model.config.text_dim, generator=generator),
        "return_dict": False,
    }
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 7, model.config.image_dim, generator=generator)
    return inputs


def converted(inputs: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The same in a dtype and on a device; noise levels stay float32."""
    return {
        name: value.to(device, torch.float32 if name == "timestep" else dtype) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


@torch.no_grad()
def velocity(model: Any, inputs: dict[str, Any]) -> Tensor:
    result: Tensor = model(**inputs)[0]
    return result
