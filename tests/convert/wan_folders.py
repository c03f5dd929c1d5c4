"""Small Wan2.1 checkpoints of the real layout, written by diffusers and transformers themselves.

Tests of other folders import it as `from convert.wan_folders import write_wan_folder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

LETTERS = "abcdefghijklmnopqrstuvwxyz,."
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 40,
    "text_dim": 16,
    "freq_dim": 16,
}


def write_wan_folder(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    text: bool = True,
    vae: bool = True,
    seed: int = 0,
    max_shard_size: int | str = "10GB",
    **config: Any,
) -> Path:
    """Write a WanPipeline with random weights, as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers` is laid out.

    Args:
        folder: where; made if it is not there.
        dtype: of transformer and text encoder; the VAE is float32, as Wan's is.
        text: with text_encoder/ and tokenizer/.
        vae: with vae/. Without VAE and text only transformer/ is written.
        seed: another seed, other weights.
        max_shard_size: of every weight file, as in "50KB".
        config: changes of the transformer's sizes, such as num_layers=3.
    Returns:
        the folder.
    """
    transformer = random_weights(WanTransformer3DModel(**SIZES | config), seed)
    nn.Module.to(transformer, dtype)  # all of it: the class would warn about what it keeps in float32 when loading
    if not (vae or text):
        transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
        return folder
    pipe = WanPipeline(
        tokenizer=small_tokenizer() if text else None,
        text_encoder=small_text_encoder(transformer.config.text_dim, seed).to(dtype) if text else None,
        vae=small_vae(seed) if vae else None,
        scheduler=UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", num_train_timesteps=1000
        ),
        transformer=transformer,
    )
    pipe.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def small_vae(seed: int = 0, **changes: Any) -> AutoencoderKLWan:
    """Wan's VAE at its real strides and latent channels, but narrow."""
    return random_weights(
        AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1, **changes), seed
    )


def small_text_encoder(width: int, seed: int = 0) -> UMT5EncoderModel:
    """UMT5 of two layers over the vocabulary of `small_tokenizer`."""
    config = UMT5Config(
        vocab_size=len(LETTERS) + 4,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return random_weights(UMT5EncoderModel(config), seed)


def small_tokenizer() -> T5Tokenizer:
    """A token for every letter; an empty prompt is the one token `</s>`, as in Wan's tokenizer."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -3.0) for letter in LETTERS)], extra_ids=0, model_max_length=512)


@torch.no_grad()
def random_weights(module: nn.Module, seed: int) -> Any:
    """Give every parameter a random value that keeps activations near one, so that no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and name.endswith("weight"):
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif name.endswith(("weight", "gamma")):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return module.eval()
