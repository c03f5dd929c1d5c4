"""What the ops of attention over groups share: checks of their arguments, and what their kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast.checks import check_match, check_shape, describe

# What the CUDA kernels take; csrc/kernels/multi_stream_attention/multi_stream_attention.h.
KERNEL_DTYPES = (torch.bfloat16,)
KERNEL_HEAD_DIMS = (64, 128)
KERNEL_MAX_GROUPS = 1024
QUERY_TILE = 128


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check queries, keys and values `[B,T,heads,d]` of one of `dtypes`, T = G * group_size, and a group mask.

    Raises:
        ValueError: shapes disagree, or T is no multiple of group_size.
        TypeError: a dtype is wrong.
    """
    check_shape("q", q, ("B", "T", "heads", "d"))
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, ("B", "T", "heads", "d"))
        check_match(name, tensor, q.shape, "q", q)
    if q.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"q: expected {', '.join(names)} or {last}, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} to match q, got {tensor.dtype}")
    _check_groups(q, group_size, group_mask)


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


def refused(q: Tensor, group_size: int, group_mask: Tensor | None) -> str:
    """Why the kernels do not take these shapes; the empty string where they do."""
    dim, groups = q.shape[-1], q.shape[1] // group_size
    if dim not in KERNEL_HEAD_DIMS:
        return f"the kernel takes head dims 64 and 128, got {dim}"
    if group_mask is not None and groups > KERNEL_MAX_GROUPS:
        return f"the kernel takes at most {KERNEL_MAX_GROUPS} groups, got {groups}"
    return ""


def readable(*tensors: Tensor) -> bool:
    """Whether the tensors hold values now: nothing is traced, and none is a fake or another subclass."""
    return not torch.compiler.is_compiling() and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def mask_on(device: torch.device, group_mask: Tensor | None) -> Tensor | None:
    """The mask on the kernels' device; nothing waits for the copy where the values are there."""
    if group_mask is None:
        return None
    # Memory that is not pinned has been read when the copy returns; pinned memory could be written to meanwhile.
    waits = not readable(group_mask) or (group_mask.device.type == "cpu" and group_mask.is_pinned())
    return group_mask.to(device, non_blocking=not waits)


def mask_arguments(mask: Tensor | None) -> tuple[int, int, int, int]:
    """The mask as the launchers take it: the address, and the strides of clips, query groups and key groups."""
    if mask is None:
        return 0, 0, 0, 0
    clip, *queries, key = mask.stride()
    return mask.data_ptr(), clip, queries[0] if queries else 0, key


def new_plan(q: Tensor, group_size: int, mask: Tensor | None, *, of_keys: bool = False) -> Tensor:
    """Memory for the kernels' plan: int32 `[B, attention_plan_size of the kernel's header]`.

    Args:
        q: [B,T,heads,d].
        group_size, mask: those of the op.
        of_keys: whether it is a plan of what keys are seen by, and not of what queries see.
    """
    batch, tokens = q.shape[:2]
    groups = 1 if mask is None else tokens // group_size
    by_row = mask_arguments(mask)[3 if of_keys else 2] != 0
    rows, run = (groups, tokens // groups) if by_row else (1, tokens)
    size = 1 + 3 * rows * -(-run // QUERY_TILE) + rows * (1 + 2 * ((groups + 1) // 2))
    return torch.empty(batch, size, dtype=torch.int32, device=q.device)
