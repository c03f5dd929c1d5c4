"""Attention over groups of tokens: checks, dispatch, tracing and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from u4d_fast import backend as backends
from u4d_fast.checks import check_match, check_shape, describe
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as reference_multi_stream_attention

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
            sees which key group (second). None: all see all. Its values are needed on the host: keep it on the CPU,
            where that costs nothing; a mask on a GPU is waited for at each call. Under torch.compile it is moved beside
            q, and so is always waited for on a GPU.
        backend: "auto" or "reference"; there is no compiled kernel yet.
    Returns:
        [B,T,heads,d]. A query that sees nothing gives zeros, and gets zeros as its gradient.
    Raises:
        ValueError: shapes disagree, T is no multiple of group_size, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        The seed, section "Base"; spec.md sections 2 and 6.
    """
    check_shape("q", q, ("B", "T", "heads", "d"))
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, ("B", "T", "heads", "d"))
        check_match(name, tensor, q.shape, "q", q)
    _check_dtypes(q, k, v)
    _check_groups(q, group_size, group_mask)
    backends.resolve("multi_stream_attention", backend, q, k, v)  # refuses what can't be had; all else: the reference
    if q.device.type != "meta" and (group_mask is None or _readable(q, k, v, group_mask)):
        return reference_multi_stream_attention(q, k, v, group_size, group_mask)
    mask = None if group_mask is None else group_mask.to(q.device)
    attended: Tensor = torch.ops.u4d_fast.multi_stream_attention(q, k, v, group_size, mask)
    return attended


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float32, float64, bfloat16 or float16, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} to match q, got {tensor.dtype}")


def _check_groups(q: Tensor, group_size: int, group_mask: Tensor | None) -> None:
    batch, tokens = q.shape[:2]
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1 token, got {group_size}")
    if tokens % group_size:
        wanted = f"[B,T,heads,d] with T a multiple of group_size {group_size}"
        raise ValueError(f"q: expected {wanted}, got {describe(q.shape)}")
    if group_mask is None:
        return
    groups = tokens // group_size
    by_key, by_pair = (batch, groups), (batch, groups, groups)
    if tuple(group_mask.shape) not in (by_key, by_pair):
        raise ValueError(
            f"group_mask: expected {describe(by_key)} or {describe(by_pair)} to match q {describe(q.shape)} in groups "
            f"of {group_size}, got {describe(group_mask.shape)}"
        )
    if group_mask.dtype != torch.bool:
        raise TypeError(f"group_mask: expected bool, got {group_mask.dtype}")


def _readable(*tensors: Tensor) -> bool:
    """Whether the tensors hold values now: nothing is traced, and none is a fake or another subclass."""
    return not torch.compiler.is_compiling() and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def _reference(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None) -> Tensor:
    return reference_multi_stream_attention(q, k, v, group_size, group_mask).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


def _grad_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
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


def _grad_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.group_size, group_mask = inputs
    ctx.save_for_backward(q, k, v, group_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, group_mask = ctx.saved_tensors
    return (*torch.ops.u4d_fast.multi_stream_attention_grad(grad, q, k, v, ctx.group_size, group_mask), None, None)


# There is no kernel: what runs in its place is the reference.
backends.register(
    "multi_stream_attention_grad",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? group_mask) -> (Tensor, Tensor, Tensor)",
    kernel=_grad_reference,
    reference=_grad_reference,
    fake=_grad_fake,
)
backends.register(
    "multi_stream_attention",
    "(Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? group_mask) -> Tensor",
    kernel=_reference,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
