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

OP = "multi_stream_attention"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What the CUDA kernel takes; csrc/kernels/multi_stream_attention/multi_stream_attention.h.
KERNEL_DTYPES = (torch.bfloat16,)
KERNEL_HEAD_DIMS = (64, 128)
KERNEL_MAX_GROUPS = 1024
QUERY_TILE = 128
ALIGNMENT = 16  # bytes

# Whether "auto" takes the kernel where all see all. torch has cuDNN's and FlashAttention's kernels for that case: not
# before it has been measured to be faster.
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
            at most 1024 groups; it reads the mask on the GPU and waits for nothing. "auto" takes it for a mask where no
            gradient is wanted: its gradient is the reference's, which computes the attention once more.
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
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    chosen = _choose(q, k, v, group_size, group_mask, backend, wants_grad)
    if q.device.type != "meta" and (group_mask is None or _readable(q, k, v, group_mask)):
        if chosen == "reference":
            return reference_multi_stream_attention(q, k, v, group_size, group_mask)
        if not wants_grad and _readable(q, k, v):
            return attention_with_lse(q, k, v, group_size, group_mask)[0]
    mask = None if group_mask is None else group_mask.to(q.device)
    # A saved program chooses where it runs, unless the choice was the user's or hangs on gradients.
    carried = "auto" if _is_auto(backend) and not wants_grad else chosen
    attended: Tensor = torch.ops.u4d_fast.multi_stream_attention(q, k, v, group_size, mask, carried)
    return attended


def _is_auto(backend: str) -> bool:
    return backend == "auto" and backends.default_backend() == "auto"


def _choose(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str, wants_grad: bool
) -> str:
    """The implementation: "cuda" or "reference"."""
    # There is no CPU kernel of any dtype, and that is the better reason to give there.
    dtypes = KERNEL_DTYPES if q.device.type == "cuda" else DTYPES
    chosen = backends.resolve(OP, backend, q, k, v, dtypes=dtypes)
    if chosen == "reference":
        return chosen
    refused = _refused(q, group_size, group_mask)
    if _is_auto(backend):
        by_kernel = not refused and not wants_grad and (DENSE_BY_KERNEL or group_mask is not None)
        return chosen if by_kernel else "reference"
    if refused:
        raise backends.BackendError(f"{OP}: backend {chosen!r} cannot run: {refused}")
    return chosen


def _refused(q: Tensor, group_size: int, group_mask: Tensor | None) -> str:
    """Why the kernel does not take these shapes; the empty string where it does."""
    dim, groups = q.shape[-1], q.shape[1] // group_size
    if dim not in KERNEL_HEAD_DIMS:
        return f"the kernel takes head dims 64 and 128, got {dim}"
    if group_mask is not None and groups > KERNEL_MAX_GROUPS:
        return f"the kernel takes at most {KERNEL_MAX_GROUPS} groups, got {groups}"
    return ""


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
    q, k, v = (_loadable(x) for x in (q, k, v))
    mask: Tensor | None = None
    mask_strides: tuple[int, ...] = (0, 0, 0)
    if group_mask is not None:
        # Memory that is not pinned has been read when the copy returns; pinned memory could be written to meanwhile.
        waits = group_mask.device.type == "cpu" and group_mask.is_pinned()
        mask = group_mask.to(q.device, non_blocking=not waits)
        mask_strides = mask.stride() if mask.ndim == 3 else (mask.stride(0), 0, mask.stride(1))
    groups = 1 if mask is None else tokens // group_size
    plan_size = _plan_size(groups, tokens // groups, by_query=mask_strides[1] != 0)
    plan = torch.empty(batch, plan_size, dtype=torch.int32, device=q.device)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    backends.call(
        OP,
        q.device,
        *(x.data_ptr() for x in (q, k, v)),
        *(batch, tokens, heads, dim),
        *strides,
        group_size,
        0 if mask is None else mask.data_ptr(),
        *mask_strides,
        *(x.data_ptr() for x in (plan, out, lse)),
    )
    return out, lse


def _loadable(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where the GPU's copy engine could not read it in place."""
    in_place = x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        in_place = in_place and (size == 1 or (stride > 0 and stride * x.element_size() % ALIGNMENT == 0))
    return x if in_place else x.clone(memory_format=torch.contiguous_format)


def _plan_size(groups: int, group_size: int, by_query: bool) -> int:
    """int32 elements of one clip's plan: `attention_plan_size` of the kernel's header."""
    rows, queries = (groups, group_size) if by_query else (1, groups * group_size)
    return 1 + 3 * rows * -(-queries // QUERY_TILE) + rows * (1 + 2 * ((groups + 1) // 2))


def _run(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str = "auto") -> Tensor:
    """What the registered op does: the choice again, now for the tensors that are there."""
    if _choose(q, k, v, group_size, group_mask, backend, wants_grad=False) == "cuda":
        return attention_with_lse(q, k, v, group_size, group_mask)[0]
    return reference_multi_stream_attention(q, k, v, group_size, group_mask).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, backend: str = "auto") -> Tensor:
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
    q, k, v, ctx.group_size, group_mask, _ = inputs
    ctx.save_for_backward(q, k, v, group_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, group_mask = ctx.saved_tensors
    return (
        *torch.ops.u4d_fast.multi_stream_attention_grad(grad, q, k, v, ctx.group_size, group_mask),
        None,
        None,
        None,
    )


# There is no kernel of the gradient: what runs in its place is the reference.
backends.register(
    "multi_stream_attention_grad",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, SymInt group_size, Tensor? group_mask) -> (Tensor, Tensor, Tensor)",
    kernel=_grad_reference,
    reference=_grad_reference,
    fake=_grad_fake,
)
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
