"""A block of diffusers' Wan transformer on the ops of this library: what `accelerate` puts in place of its forward.

Parts of the block may have been replaced or hooked to (LoRA, quantisation, offloading, context parallelism). What is
replaced is called, and a part whose weights can't be read past its own forward runs as it did; see `wan_parts`.
Source: diffusers/models/transformers/transformer_wan.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from u4d_fast.backend import SINGLE_AND_HALF, resolve
from u4d_fast.dense_attention import dense_attention
from u4d_fast.ops.ada_layer_norm import ada_layer_norm
from u4d_fast.ops.bias_gelu import bias_gelu
from u4d_fast.ops.gated_residual import gated_residual
from u4d_fast.ops.gated_residual_norm import gated_residual_norm
from u4d_fast.ops.qk_norm_rope import qk_norm_rope
from u4d_fast.ops.rms_norm import rms_norm
from u4d_fast.wan_parts import attention_kept, block_kept, feed_forward_kept, has_readable_affine


def block_forward(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    """`WanTransformerBlock.forward`: its arguments, its result.

    Args:
        block: a `WanTransformerBlock`.
        hidden_states: [B,T,D].
        encoder_hidden_states: [B,L,D], those of an image before those of the text.
        temb: [B,6,D], or [B,T,6,D] where each token has a noise level of its own.
        rotary_emb: cosines and sines, [1,T,1,d] each, every number twice.
    """
    if block_kept(block):
        return cast(Tensor, type(block).forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb))
    x = hidden_states[None]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation(block.scale_shift_table, temb)
    normed = ada_layer_norm(x, shift, scale, block.norm1.eps)
    update = self_attention(block.attn1, normed[0], rotary_emb).type_as(x)[None]
    x, normed = residual_and_affine_norm(block.norm2, x, update, gate)
    update = cross_attention(block.attn2, normed[0], encoder_hidden_states).type_as(x)[None]
    open_gate = torch.ones_like(gate[:, :1, :1]).expand_as(gate)
    x, normed = gated_residual_norm(x, update, open_gate, ffn_shift, ffn_scale, block.norm3.eps)
    del update  # memory: the feed-forward is where a block takes most
    update = feed_forward(block.ffn, normed[0]).type_as(x)[None]
    del normed
    return gated_residual(x, update, ffn_gate)[0]


def modulation(scale_shift_table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """[1,6,D] and [B,6,D] or [B,T,6,D] -> shift, scale and gate of attention, then of the feed-forward: [1,B,1|T,D]."""
    table = scale_shift_table + temb.float()
    return (table if temb.ndim == 4 else table[:, None])[None].unbind(-2)


def self_attention(attn: Any, x: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Every token attends to every other: [B,T,D] -> [B,T,D]."""
    if attention_kept(attn):
        return cast(Tensor, attn(x, None, None, rotary_emb))
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    cos, sin = (part[0, :, 0, first::2].float().contiguous() for first, part in enumerate(rotary_emb))
    q = qk_norm_rope(query[None], attn.norm_q.weight[None], cos, sin, attn.heads, attn.norm_q.eps)
    k = qk_norm_rope(key[None], attn.norm_k.weight[None], cos, sin, attn.heads, attn.norm_k.eps)
    return project(attn, dense_attention(q, k, value.unflatten(-1, (attn.heads, -1))))


def cross_attention(attn: Any, x: Tensor, text: Tensor) -> Tensor:
    """Every token attends to the text: [B,T,D], [B,L,D] -> [B,T,D]."""
    if attention_kept(attn):
        return cast(Tensor, attn(x, text, None, None))
    query = attn.to_q(x)
    if getattr(attn, "fused_projections", False):
        key, value = attn.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(text), attn.to_v(text)
    q = rms_norm(query[None], attn.norm_q.weight[None], attn.norm_q.eps)[0]
    k = rms_norm(key[None], attn.norm_k.weight[None], attn.norm_k.eps)[0]
    return project(attn, dense_attention(*(part.unflatten(-1, (attn.heads, -1)) for part in (q, k, value))))


def project(attn: Any, attended: Tensor) -> Tensor:
    """What attention found, [B,T,heads,d], through the last projection (and its dropout)."""
    x = attended.flatten(2)
    for module in attn.to_out:
        x = module(x)
    return x


def residual_and_affine_norm(norm: Any, x: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """`x + update * gate`, and its norm with weights that are the same for every token; all [1,B,T,D]."""
    if not has_readable_affine(norm):
        x = gated_residual(x, update, gate)
        return x, norm(x.float()).type_as(x)
    # An affine layer norm is an adaptive one whose tables are the same for every clip.
    shift, scale = norm.bias.expand_as(gate), (norm.weight.float() - 1).expand_as(gate)
    return gated_residual_norm(x, update, gate, shift, scale, norm.eps)


def feed_forward(ffn: Any, x: Tensor) -> Tensor:
    """Linear layer, tanh GELU, linear layer: [B,T,D] -> [B,T,D]."""
    # Without a kernel bias_gelu would store the hidden layer, the largest tensor of a block, in float32.
    if feed_forward_kept(ffn) or resolve("bias_gelu", "auto", x, dtypes=SINGLE_AND_HALF) == "reference":
        return cast(Tensor, ffn(x))
    proj = ffn.net[0].proj
    x = bias_gelu(linear(x, proj.weight)[None], proj.bias[None], inplace=not torch.is_grad_enabled())[0]
    for module in ffn.net[1:]:
        x = module(x)
    return x
