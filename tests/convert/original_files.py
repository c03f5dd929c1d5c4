"""Wan2.1 as its original release stores it: the names of wan/modules/model.py and wan/modules/vae.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

# diffusers' words and the release's, in the order in which they are replaced.
TRANSFORMER_WORDS = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
    ("proj_out", "head.head"),
)
RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}


def original_name(name: str) -> str:
    """The release's name of a tensor of diffusers' `WanTransformer3DModel`."""
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in TRANSFORMER_WORDS:
        name = name.replace(ours, theirs)
    return name.replace("scale_shift_table", "modulation")


def original_vae_name(name: str) -> str:
    """The release's name of a tensor of diffusers' `AutoencoderKLWan`."""
    name = name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
    name = name.replace("conv_in", "conv1").replace("norm_out", "head.0").replace("conv_out", "head.2")
    name = name.replace("mid_block.attentions.0", "middle.1")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"middle.{2 * int(found[1])}", name)
    name = name.replace("down_blocks", "downsamples")
    name = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"upsamples.{4 * int(found[1]) + int(found[2])}", name
    )
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"upsamples.{4 * int(found[1]) + 3}", name)
    for ours, theirs in RESIDUAL.items():
        name = re.sub(rf"(middle|downsamples|upsamples)\.(\d+)\.{ours}\.", rf"\1.\2.{theirs}.", name)
    return name.replace("conv_shortcut", "shortcut")


def original_tensors(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A transformer's tensors under the release's names."""
    return {prefix + original_name(name): tensor.contiguous() for name, tensor in tensors.items()}


def write_original_folder(folder: Path, transformer: Any, max_shard_size: int = 10**10, **changes: Any) -> Path:
    """A folder as Wan-AI/Wan2.1-T2V-1.3B has it: config.json of WanModel and its weights.

    Args:
        folder: made if it is not there.
        transformer: a WanTransformer3DModel.
        max_shard_size: bytes of a file; more make several files and an index.
        changes: of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = transformer.config
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": sizes.num_attention_heads * sizes.attention_head_dim,
        "eps": 1e-06,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": sizes.num_attention_heads,
        "num_layers": sizes.num_layers,
        "out_dim": 16,
        "text_dim": sizes.text_dim,
        "text_len": 512,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors = original_tensors(transformer.state_dict())
    plan = split_torch_state_dict_into_shards(
        tensors, max_shard_size=max_shard_size, filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
    )
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def original_vae_tensors(vae: torch.nn.Module) -> dict[str, Tensor]:
    """A VAE's tensors under the release's names."""
    return {original_vae_name(name): tensor.contiguous() for name, tensor in vae.state_dict().items()}
