"""What the tests of the attention kernels in the emulation of Hopper's instructions share."""

from __future__ import annotations

import ctypes
import math

import torch
from group_masks import as_pairs, random_qkv
from shim_compiler import op_library
from torch import Tensor

ORDERS = (0, 1)  # of the threads of a block: first to last, last to first
TILE_ROWS = 128  # that a block owns


def bf16_qkv(seed: int, batch: int, tokens: int, heads: int, dim: int) -> list[Tensor]:
    return random_qkv(seed, torch.bfloat16, (batch, tokens, heads, dim))


def prepared_library(op: str, order: int, seed: int) -> ctypes.CDLL:
    """The op's kernels, compiled for the CPU; its threads take their turns in one of `ORDERS`, and copies come by
    chance."""
    library = op_library(op)
    library.u4d_shim_failure.restype = ctypes.c_char_p
    library.u4d_shim_last_thread_first(order)
    library.u4d_shim_seed(seed)
    return library


def as_c(arguments: list[Tensor | int | None]) -> list[ctypes.c_int64 | ctypes.c_void_p]:
    """Tensors become pointers."""
    return [
        ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_void_p(None if x is None else x.data_ptr())
        for x in arguments
    ]


def launch(op: str, arguments: list[Tensor | int | None], order: int = 0, seed: int = 1) -> tuple[int, str]:
    """Call the op's launcher: its status, and what the emulation found wrong."""
    library = prepared_library(op, order, seed)
    status = getattr(library, f"{op}_cuda")(ctypes.c_void_p(None), *as_c(arguments))
    return status, library.u4d_shim_failure().decode()


def mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Of clips, query groups and key groups, as the launchers take them."""
    if mask is None:
        return (0, 0, 0)
    return mask.stride() if mask.ndim == 3 else (mask.stride(0), 0, mask.stride(1))


def plan_size(groups: int, group_size: int, by_row: bool) -> int:
    """`attention_plan_size` of multi_stream_attention.h."""
    rows, run = (groups, group_size) if by_row else (1, groups * group_size)
    return 1 + 3 * rows * math.ceil(run / TILE_ROWS) + rows * (1 + 2 * ((groups + 1) // 2))


def exact_lse(q: Tensor, k: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """log(sum(exp(scores))) in float64, `[B,heads,T]`: -inf where nothing is seen."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        seen = as_pairs(mask)[: q.shape[0]].repeat_interleave(size, 1).repeat_interleave(size, 2)
        scores = scores.masked_fill(~seen[:, None], -math.inf)
    return scores.logsumexp(-1)
