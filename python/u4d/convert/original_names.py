"""Tensor names of the original Wan2.1 release in diffusers' words, one by one.

Source: github.com/Wan-Video/Wan2.1, wan/modules/model.py; diffusers' `convert_wan_transformer_to_diffusers`, which
renames whole state dictionaries, is what the tests compare with.
"""

from __future__ import annotations

import re

PREFIX = "model.diffusion_model."  # as some programs repack the release
TENSOR = re.compile(r"(?:(?P<block>blocks\.\d+)\.)?(?P<module>.+?)(?P<kind>\.weight|\.bias)?")
OUTSIDE_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
IN_BLOCKS = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in ATTENTION.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in ATTENTION.items()},
    "norm3": "norm2",  # the only norm with weights: the one before cross-attention
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}


def is_original(names: set[str]) -> bool:
    """Whether tensors are named as in the original release."""
    return any(name.removeprefix(PREFIX) == "head.modulation" for name in names)


def diffusers_name(name: str) -> str | None:
    """diffusers' name of a tensor of the original release; None for one that text-to-video Wan2.1 does not have."""
    parts = TENSOR.fullmatch(name.removeprefix(PREFIX))
    if parts is None:
        return None
    block, module, kind = parts.group("block", "module", "kind")
    translated = (IN_BLOCKS if block else OUTSIDE_BLOCKS).get(module)
    if translated is None:
        return None
    return ".".join(filter(None, (block, translated))) + (kind or "")
