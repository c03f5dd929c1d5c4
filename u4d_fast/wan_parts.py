"""Which parts of diffusers' Wan block can run on the ops of this library, and why others can't.

Classes are known by their names: this library does not import diffusers. Every function here is asked again at each
call of a block, since LoRA, hooks and processors come and go; an empty answer means that nothing is in the way.
"""

from __future__ import annotations

from typing import Any

from torch import nn

PARTS = ("norm1", "attn1", "norm2", "attn2", "ffn", "norm3", "scale_shift_table")
ARGUMENTS = ("self", "hidden_states", "encoder_hidden_states", "temb", "rotary_emb")


def is_diffusers(thing: object, name: str) -> bool:
    """Whether an object's class is diffusers' class of that name, or one derived from it."""
    return any(base.__name__ == name and base.__module__.startswith("diffusers.") for base in type(thing).__mro__)


def is_changed(module: nn.Module) -> bool:
    """Whether something was hooked to a module or put in place of its forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def is_plain(module: Any, name: str) -> bool:
    """Whether a module is of just that class of torch or diffusers, and unchanged."""
    return type(module).__name__ == name and isinstance(module, nn.Module) and not is_changed(module)


def block_kept(block: Any) -> str:
    """Why a whole block runs as it did."""
    if not (is_plain(block.norm1, "FP32LayerNorm") and is_plain(block.norm3, "FP32LayerNorm")):
        return "norm1 or norm3 was replaced or hooked to"
    return ""


def attention_kept(attn: Any) -> str:
    """Why an attention runs as it did."""
    if not is_plain(attn, "WanAttention"):
        return f"{type(attn).__name__} was replaced or hooked to"
    processor = attn.processor
    if type(processor).__name__ != "WanAttnProcessor":
        return f"it has a processor of its own, {type(processor).__name__}"
    if processor._attention_backend is not None:
        return "an attention backend was chosen for it"
    if processor._parallel_config is not None:
        return "it is spread over several devices"
    if attn.add_k_proj is not None:
        return "it attends to an image beside the text"
    if not (is_plain(attn.norm_q, "RMSNorm") and is_plain(attn.norm_k, "RMSNorm")):
        return "norm_q or norm_k was replaced or hooked to"
    return ""


def feed_forward_kept(ffn: Any) -> str:
    """Why a feed-forward runs as it did."""
    if not is_plain(ffn, "FeedForward"):
        return f"{type(ffn).__name__} was replaced or hooked to"
    first = ffn.net[0]
    if not is_plain(first, "GELU") or first.approximate != "tanh":
        return "its activation is not diffusers' tanh GELU"
    proj = first.proj
    if type(proj) is not nn.Linear or is_changed(proj) or type(proj.weight) is not nn.Parameter or proj.bias is None:
        return "its first linear layer was replaced or hooked to"
    return ""


def has_readable_affine(norm: Any) -> bool:
    """Whether a layer norm is diffusers' own, with a weight and a bias that can be read."""
    return is_plain(norm, "FP32LayerNorm") and norm.weight is not None and norm.bias is not None
