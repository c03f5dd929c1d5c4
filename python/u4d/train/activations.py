"""What the backward pass finds in memory, and what it computes again; and how blocks are run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from u4d.model.transformer import Transformer


def attention_ops() -> list[Any]:
    """Torch's fused attentions and ours: slow to compute again, small to keep. Also those of cross-attention."""
    aten = torch.ops.aten
    return [
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.u4d_fast.multi_stream_attention.default,
        torch.ops.u4d_fast.multi_stream_attention_with_lse.default,
    ]


def keep_activations(model: Transformer, policy: str) -> None:
    """Choose what is kept of each block for the backward pass.

    Args:
        model: what is trained; gradients are the same whatever is chosen.
        policy: "all"; "attention": attention's results, the rest of a block is computed again; "none": nothing but
            the block's input.
    """
    if policy == "all":
        model.disable_gradient_checkpointing()
        return
    again: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if policy == "attention":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, attention_ops()))
    model.enable_gradient_checkpointing(again)


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Compile each block in place; names of parameters stay."""
    for block in model.blocks:
        block.compile(backend=backend)


def efficient_attention(device: torch.device, policy: str) -> AbstractContextManager[None]:
    """Which of torch's attentions are used.

    On a CPU plain bf16 products are 1.3x as fast in training as the fused kernel (docs/lab-notes.md). They have no
    single result to keep though, and store a weight for each pair of tokens, so that a policy that saves memory takes
    the fused one.
    """
    if device.type == "cuda":
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return sdpa_kernel([SDPBackend.MATH] if policy == "all" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
