"""Attention over groups of tokens: checks, dispatch, tracing and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.attention_grads import kernel_runs, multi_stream_attention_grad
from u4d_fast.attention_inputs import (
    KERNEL_DTYPES,
    check_attention,
    mask_arguments,
    mask_on,
    new_plan,
    readable,
    refused,
)
from u4d_fast.reference.multi_stream_attention import log_sum_exp
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as reference_multi_stream_attention

OP = "multi_stream_attention"
WITH_LSE = "multi_stream_attention_with_lse"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Whether "auto" takes the kernel where all see all and no gradient is wanted. torch has cuDNN's and FlashAttention's
# kernels for that case: not before it has been measured to be faster.
DENSE_BY_KERNEL = False


def multi_stream_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    group_mask: Tensor | None = None,
    *,
    backend: backends.Backend = "auto",
) -> Tensor:
    """Softmax attention over the tokens of all streams, in which whole groups see or do not see each other.

    A group is `group_size` neighbouring tokens; in u4d one latent frame of one stream. A pair of groups that do not see
    each other costs nothing, and a key that nobody sees is never read. The scale is 1/sqrt(d).

    Differentiable in q, k and v.

    Args:
        q, k, v: [B,T,heads,d], T = G * group_size; one dtype: float32, float64, bfloat16 or float16.
        group_size: tokens in a group.
        group_mask: bool. [B,G]: which groups exist as keys, for all queries alike. [B,G,G]: which query group (first)
            sees which key group (second). None: all see all. The reference needs its values on the host: keep it on the
            CPU, where that costs nothing; a mask on a GPU is waited for at each call. Under torch.compile it is moved
            beside q, and so the reference always waits for it on a GPU. In a captured graph it must be on the GPU.
        backend: "auto", "reference" or "cuda". The kernel is for Hopper GPUs, bfloat16, d = 64 or 128 and, with a mask,
            at most 1024 groups; it reads the mask on the GPU and waits for nothing. "auto" takes it where there is a
            mask. Its gradients come from a kernel of their own.
    Returns:
        [B,T,heads,d]. A query that sees nothing gives zeros, and gets zeros as its gradient.
    Raises:
        ValueError: shapes disagree, T is no multiple of group_size, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        The seed, section "Base"; spec.md sections 2 and 6.
    """
    check_attention(q, k, v, group_size, group_mask, DTYPES)
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    chosen = _choose(q, k, v, group_size, group_mask, backend, wants_grad)
    readable_now = readable(q, k, v, *([] if group_mask is None else [group_mask]))
    if chosen == "reference" and q.device.type != "meta" and (group_mask is None or readable_now):
        return reference_multi_stream_attention(q, k, v, group_size, group_mask)
    if chosen == "cuda" and readable_now and not wants_grad:
        return attention_with_lse(q, k, v, group_size, group_mask)[0]
    mask = mask_on(q.device, group_mask)
    attended: Tensor
    if chosen == "cuda" and wants_grad:
        # As an op also in eager mode: activation checkpointing keeps the results of ops that it knows.
        attended = torch.ops.u4d_fast.multi_stream_attention_with_lse(q, k, v, group_size, mask)[0]
        return attended
    # A saved program chooses where it runs, unless the choice was the user's or hangs on gradients.
    carried = "auto" if backends.is_auto(backend) and not (wants_grad and chosen == "reference") else chosen
    attended = torch.ops.u4d_fast.multi_stream_attention(q, k, v, group_size, mask, carried)
    return attended


def _choose(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str, wants_grad: bool
) -> str:
    """The implementation: "cuda" or "reference"; "meta" stands for both."""
    # There is no CPU kernel of any dtype, and that is the better reason to give there.
    dtypes = KERNEL_DTYPES if q.device.type == "cuda" else DTYPES
    chosen = backends.resolve(OP, backend, q, k, v, dtypes=dtypes)
    if chosen == "reference":
        return chosen
    reason = refused(q, group_size, group_mask)
    if backends.is_auto(backend):
        by_kernel = not reason and (group_mask is not None or (DENSE_BY_KERNEL and not wants_grad))
        return chosen if by_kernel else "reference"
    if reason:
        raise backends.BackendError(f"{OP}: backend {chosen!r} cannot run: {reason}")
    return chosen


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The CUDA kernel: the attention `[B,T,heads,d]`, and log(sum(exp(scores))) `[B,heads,T]` in float32.

    The arguments are those of `multi_stream_attention`, checked; the mask may be on the CPU.
    """
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse.fill_(-torch.inf)
    mask = mask_on(q.device, group_mask)
    plan = new_plan(q, group_size, mask)
    given = [backends.loadable(x) for x in (q, k, v)]
    backends.call(
        OP,
        q.device,
        *(x.data_ptr() for x in given),
        *(batch, tokens, heads, dim),
        *(stride for x in given for stride in x.stride()[:3]),
        group_size,
        *mask_arguments(mask),
        *(x.data_ptr() for x in (plan, out, lse)),
    )
    return out, lse


def _run(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str = "auto") -> Tensor:
    """What the registered op does: the choice again, now for the tensors that are there."""
    if _choose(q, k, v, group_size, group_mask, backend, wants_grad=False) == "cuda":
        return attention_with_lse(q, k, v, group_size, group_mask)[0]
    return reference_multi_stream_attention(q, k, v, group_size, group_mask).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str = "auto") -> Tensor:
    return q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.group_size, group_mask, _ = inputs
    ctx.save_for_backward(q, k, v, group_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, group_mask = ctx.saved_tensors
    grads = multi_stream_attention_grad(grad, q, k, v, ctx.group_size, group_mask)
    return (*grads, None, None, None)


# `_run` makes the choice itself, since the schema carries one.
backends.register(
    OP,
    '(Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? group_mask, str backend="auto") -> Tensor',
    kernel=_run,
    reference=_run,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=DTYPES,
)


# The same where the kernel runs and gradients are wanted: what the kernel of the gradient needs is a second result.


def _run_with_lse(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if kernel_runs(OP, q) and not refused(q, group_size, group_mask):
        return attention_with_lse(q, k, v, group_size, group_mask)
    out = reference_multi_stream_attention(q, k, v, group_size, group_mask).contiguous()
    return out, log_sum_exp(q, k, group_size, group_mask)


def _fake_with_lse(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def _setup_context_with_lse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.group_size, group_mask = inputs
    ctx.save_for_backward(q, k, v, group_mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_with_lse(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    q, k, v, group_mask, out, lse = ctx.saved_tensors
    grads = multi_stream_attention_grad(grad, q, k, v, ctx.group_size, group_mask, out, lse)
    return (*grads, None, None)


backends.register(
    WITH_LSE,
    "(Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? group_mask) -> (Tensor, Tensor)",
    kernel=_run_with_lse,
    reference=_run_with_lse,
    fake=_fake_with_lse,
    setup_context=_setup_context_with_lse,
    backward=_backward_with_lse,
    dtypes=DTYPES,
)
