"""Attention over groups of tokens from 8-bit numbers: checks, dispatch and tracing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from u4d_fast import attention_inputs as inputs
from u4d_fast import backend as backends
from u4d_fast.fp8 import refuse_gradients
from u4d_fast.reference.multi_stream_attention_fp8 import multi_stream_attention_fp8 as reference_attention

OP = "multi_stream_attention_fp8"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# As in csrc/kernels/multi_stream_attention_fp8/multi_stream_attention_fp8.h.
SLICE = 128
KEY_BLOCK = 16


def multi_stream_attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    group_mask: Tensor | None = None,
    *,
    backend: backends.Backend = "auto",
) -> Tensor:
    """`multi_stream_attention` with products of 8-bit numbers (e4m3): faster on Hopper GPUs, and less exact.

    q is rounded with a scale for each row, k and v with one for each head of a clip (the largest finite magnitude on
    448), the weights relative to the largest of their query. Against exact attention the relative error is about 5 % on
    normal random numbers (bfloat16: 0.4 %), and less where the result is a mean of many similar values.

    What a query does not see has no influence on it but through the scales of k and v, which count what anybody sees.
    Infinity in k or v counts as NaN. There are no gradients.

    Args:
        q, k, v: [B,T,heads,d], T = G * group_size; one dtype: float32, bfloat16 or float16.
        group_size: tokens in a group.
        group_mask: bool, [B,G] or [B,G,G] as in `multi_stream_attention`.
        backend: "auto", "reference" or "cuda". The kernel is for Hopper GPUs, bfloat16, d = 64 or 128 and, with a mask,
            at most 1024 groups; it reads the mask on the GPU and waits for nothing. "auto" takes it where it can.
    Returns:
        [B,T,heads,d] in q's dtype. A query that sees nothing gives zeros.
    Raises:
        ValueError: shapes disagree, T is no multiple of group_size, a gradient is wanted, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Shah et al., "FlashAttention-3", 2024, section 3.3: 8-bit products with the weights in registers.
    """
    inputs.check_attention(q, k, v, group_size, group_mask, DTYPES)
    refuse_gradients(OP, q=q, k=k, v=v)
    if q.device.type != "meta" and inputs.readable(q, k, v, *([] if group_mask is None else [group_mask])):
        return _run(q, k, v, group_size, group_mask, backend)
    chosen = _choose(q, k, v, group_size, group_mask, backend)
    mask = None if group_mask is None else group_mask.to(q.device)
    # A saved program chooses where it runs, unless the choice was the user's.
    carried = "auto" if backends.is_auto(backend) else chosen
    attended: Tensor = torch.ops.u4d_fast.multi_stream_attention_fp8(q, k, v, group_size, mask, carried)
    return attended


def _choose(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str) -> str:
    """The implementation: "cuda" or "reference"; "meta" stands for both."""
    # There is no CPU kernel of any dtype, and that is the better reason to give there.
    dtypes = inputs.KERNEL_DTYPES if q.device.type == "cuda" else DTYPES
    chosen = backends.resolve(OP, backend, q, k, v, dtypes=dtypes)
    reason = inputs.refused(q, group_size, group_mask)
    if chosen != "cuda" or not reason:
        return chosen
    if backends.is_auto(backend):
        return "reference"
    raise backends.BackendError(f"{OP}: backend {chosen!r} cannot run: {reason}")


@dataclass(frozen=True)
class QuantizedForKernel:
    """What the attention kernel reads, as multi_stream_attention_fp8.h says.

    Attributes:
        q, k: e4m3 bytes [B,T,heads,d].
        q_scale: [B,heads,T].
        v: e4m3 bytes [B,heads,d,T rounded up to 16].
        head_scales: [B,heads,3]: of k, of v, and whether a v is not finite.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    v: Tensor
    head_scales: Tensor


def quantize_for_kernel(q: Tensor, k: Tensor, v: Tensor, group_size: int, mask: Tensor | None) -> QuantizedForKernel:
    """The CUDA kernel's first step; the mask is on the GPU."""
    batch, tokens, heads, dim = q.shape
    q, k, v = (backends.loadable(x) for x in (q, k, v))
    padded = -(-tokens // KEY_BLOCK) * KEY_BLOCK
    groups = 0 if mask is None else tokens // group_size
    seen = torch.empty(batch, groups, dtype=torch.uint8, device=q.device)
    extents = torch.empty(batch, heads, -(-tokens // SLICE), 3, dtype=torch.int32, device=q.device)
    made = QuantizedForKernel(
        q=torch.empty(q.shape, dtype=torch.uint8, device=q.device),
        q_scale=torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device),
        k=torch.empty(q.shape, dtype=torch.uint8, device=q.device),
        v=torch.empty(batch, heads, dim, padded, dtype=torch.uint8, device=q.device),
        head_scales=torch.empty(batch, heads, 3, dtype=torch.float32, device=q.device),
    )
    outputs = (seen, extents, made.q, made.q_scale, made.k, made.v, made.head_scales)
    backends.call(
        f"{OP}_quantize",
        q.device,
        *(x.data_ptr() for x in (q, k, v)),
        *(batch, tokens, heads, dim),
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        group_size,
        *inputs.mask_arguments(mask),
        *(x.data_ptr() for x in outputs),
    )
    return made


def attend_quantized(given: QuantizedForKernel, group_size: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The CUDA kernel's second step.

    Returns:
        The attention `[B,T,heads,d]` in bfloat16, and log(sum(exp(scores))) `[B,heads,T]` in float32.
    """
    out = torch.empty(given.q.shape, dtype=torch.bfloat16, device=given.q.device)
    lse = torch.empty_like(given.q_scale)
    plan = inputs.new_plan(given.q, group_size, mask)
    backends.call(
        OP,
        given.q.device,
        *(x.data_ptr() for x in (given.q, given.q_scale, given.k, given.v, given.head_scales)),
        *given.q.shape,
        group_size,
        *inputs.mask_arguments(mask),
        *(x.data_ptr() for x in (plan, out, lse)),
    )
    return out, lse


def attention_fp8_with_lse(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The CUDA kernels: the attention `[B,T,heads,d]`, and log(sum(exp(scores))) `[B,heads,T]` in float32.

    The arguments are those of `multi_stream_attention_fp8`, checked; the mask may be on the CPU.
    """
    if not q.numel():
        batch, tokens, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_full((batch, heads, tokens), -torch.inf, dtype=torch.float32)
    mask = inputs.mask_on(q.device, group_mask)
    return attend_quantized(quantize_for_kernel(q, k, v, group_size, mask), group_size, mask)


def _run(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str = "auto") -> Tensor:
    """What the registered op does: the choice again, now for the tensors that are there."""
    if _choose(q, k, v, group_size, group_mask, backend) == "cuda":
        return attention_fp8_with_lse(q, k, v, group_size, group_mask)[0]
    return reference_attention(q, k, v, group_size, group_mask).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str = "auto") -> Tensor:
    return q.new_empty(q.shape)


# `_run` makes the choice itself, since the schema carries one.
backends.register(
    OP,
    '(Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? group_mask, str backend="auto") -> Tensor',
    kernel=_run,
    reference=_run,
    fake=_fake,
    dtypes=DTYPES,
)
