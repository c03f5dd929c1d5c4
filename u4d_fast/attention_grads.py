"""The gradients of attention over groups: the kernel, and the reference differentiated by torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from u4d_fast import backend as backends
from u4d_fast.attention_inputs import KERNEL_DTYPES, mask_arguments, mask_on, new_plan, refused
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as reference_multi_stream_attention

OP = "multi_stream_attention_grad"


def kernel_runs(op: str, q: Tensor) -> bool:
    """Whether the CUDA kernel of `op` is there for these tensors."""
    on_gpu = q.device.type == "cuda" and q.dtype in KERNEL_DTYPES
    return on_gpu and not backends.unavailable(op, "cuda", q.device.index)


def attention_grads(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group_size: int,
    group_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA kernel: the gradients of q, k and v, `[B,T,heads,d]`.

    Args:
        grad: [B,T,heads,d], of the attention.
        q, k, v, group_size, group_mask: those of the forward pass; the mask may be on the CPU.
        out: [B,T,heads,d] and
        lse: [B,heads,T], float32: what the forward kernel gave.
    """
    batch, tokens, heads, dim = q.shape
    grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    if q.numel():
        mask = mask_on(q.device, group_mask)
        plans = [new_plan(q, group_size, mask, of_keys=of_keys) for of_keys in (False, True)]
        facts = torch.empty(batch, heads, tokens, 2, dtype=torch.float32, device=q.device)
        given = [backends.loadable(x) for x in (grad, q, k, v)]
        left = [backends.loadable(out.contiguous()), lse.contiguous()]
        backends.call(
            OP,
            q.device,
            *(x.data_ptr() for x in (*given, *left)),
            *(batch, tokens, heads, dim),
            *(stride for x in given for stride in x.stride()[:3]),
            group_size,
            *mask_arguments(mask),
            *(x.data_ptr() for x in (*plans, facts, *grads)),
        )
    return grads[0], grads[1], grads[2]


def reference_grads(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference is computed once more and differentiated by torch."""
    with _autograd_in_an_operator():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attended = reference_multi_stream_attention(leaves[0], leaves[1], leaves[2], group_size, group_mask)
        grad_q, grad_k, grad_v = torch.autograd.grad(attended, leaves, grad)
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()


@contextlib.contextmanager
def _autograd_in_an_operator() -> Iterator[None]:
    """Switch autograd on where torch has switched it off: inside an operator that it calls.

    torch itself does it so (torch/_higher_order_ops/invoke_leaf_function.py). The public way, torch.func.vjp, fails
    under any TorchDispatchMode.
    """
    autograd = DispatchKeySet(DispatchKey.AutogradFunctionality) | DispatchKeySet(DispatchKey.ADInplaceOrView)
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - autograd), torch.enable_grad():
        yield


def _run(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    group_mask: Tensor | None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel where the forward pass left its results and the kernel takes them, else by the reference."""
    if out is None or lse is None or not kernel_runs(OP, q) or refused(q, group_size, group_mask):
        return reference_grads(grad, q, k, v, group_size, group_mask)
    return attention_grads(grad, q, k, v, out, lse, group_size, group_mask)


def _fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# `_run` makes the choice itself: it hangs on what the forward pass left.
backends.register(
    OP,
    "(Tensor grad, Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? group_mask, Tensor? out=None, "
    "Tensor? lse=None) -> (Tensor, Tensor, Tensor)",
    kernel=_run,
    reference=_run,
    fake=_fake,
)

multi_stream_attention_grad = torch.ops.u4d_fast.multi_stream_attention_grad
