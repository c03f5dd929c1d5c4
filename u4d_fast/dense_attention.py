"""Dense attention by whichever library is fastest on this device: one registry of backends."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d_fast.attention_libraries import LIBRARIES, TORCH_KINDS, run_torch
from u4d_fast.attention_table import rankings, unmeasured
from u4d_fast.backend import BackendError, default_backend
from u4d_fast.checks import check_match, check_shape, describe
from u4d_fast.ops.multi_stream_attention import DTYPES

ATTENTION_BACKENDS: tuple[str, ...] = tuple(LIBRARIES)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Softmax attention in which every query sees every key; the scale is 1/sqrt(d).

    Differentiable in q, k and v. Under torch.compile(fullgraph=True) with `auto`, torch's backends and `u4d`; the other
    libraries may break the graph.

    Args:
        q: [B,T,heads,d] float32, float64, bfloat16 or float16.
        k, v: [B,L,heads,d] of q's dtype, L >= 1.
        backend: one of `ATTENTION_BACKENDS`. "torch": what torch picks itself; "torch-cudnn", "torch-flash",
            "torch-efficient", "torch-math": one of its implementations; "flash-attn-2", "flash-attn-3",
            "flash-attn-4", "xformers": libraries where they are installed; "u4d": our kernel. "auto": the fastest that
            was measured on this device for this dtype, head dimension and length (`u4d bench attention --save`), and
            where nothing was, cuDNN's on Hopper in half precision and "torch" elsewhere.
    Returns:
        [B,T,heads,d] of q's dtype.
    Raises:
        BackendError: a backend was asked for by name and can't run these tensors; the reason is told.
        ValueError: shapes or devices disagree.
        TypeError: a dtype is wrong.
    """
    _check(q, k, v)
    if backend == "auto":
        return _run_fastest(q, k, v)
    library = LIBRARIES.get(backend)
    if library is None:
        raise BackendError(f"backend: expected auto or one of {', '.join(LIBRARIES)}, got {backend!r}")
    if torch.compiler.is_compiling():  # torch and our op refuse what they can't do while they are traced
        return library.run(q, k, v)
    if backend not in TORCH_KINDS:
        _refuse(backend, library.why_not(q, k, v))
        return library.run(q, k, v)
    try:  # torch refuses by itself; asking it beforehand would cost every call some 50 us
        return library.run(q, k, v)
    except RuntimeError as error:
        _refuse(backend, library.why_not(q, k, v), error)
        raise


def attention_backends(q: Tensor, k: Tensor, v: Tensor) -> dict[str, str]:
    """Every backend of `dense_attention` and why it can't run these tensors; the empty string where it can.

    Raises:
        ValueError, TypeError: as `dense_attention`.
    """
    _check(q, k, v)
    return {name: library.why_not(q, k, v) for name, library in LIBRARIES.items()}


def fastest_backends(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, ...]:
    """The backends that were measured for tensors like these, the fastest first; a guess where nothing was."""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    tokens, keys = q.shape[1], k.shape[1]
    where = q.device.type, -1 if q.device.index is None else q.device.index, q.dtype
    for row in rankings(*where):
        if (
            row.head_dim == q.shape[-1]
            and row.tokens[0] <= tokens < row.tokens[1]
            and row.keys[0] <= keys < row.keys[1]
        ):
            return row.training if training else row.forward
    return unmeasured(*where)


def _run_fastest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first that can run: a guess may be wrong for these tensors, so that nothing here is an error."""
    compiling = torch.compiler.is_compiling()
    for name in fastest_backends(q, k, v):
        if name == "torch":
            break
        if name in TORCH_KINDS:  # torch itself goes on to the next one where the fastest can't run
            first = TORCH_KINDS[name]
            return run_torch(q, k, v, (first, *(kind for kind in TORCH_KINDS.values() if kind != first)))
        if name == "u4d" and default_backend() == "reference":
            continue
        library = LIBRARIES.get(name)
        if library is not None and (library.traced or not compiling) and not library.why_not(q, k, v):
            return library.run(q, k, v)
    return LIBRARIES["torch"].run(q, k, v)


def _refuse(backend: str, reason: str, error: Exception | None = None) -> None:
    if reason:
        raise BackendError(f"dense_attention: backend {backend!r} cannot run: {reason}") from error


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_shape("q", q, ("B", "T", "heads", "d"))
    check_shape("k", k, ("B", "L", "heads", "d"))
    batch, _, heads, width = q.shape
    check_match("k", k, (batch, k.shape[1], heads, width), "q", q)
    check_shape("v", v, ("B", "L", "heads", "d"))
    check_match("v", v, k.shape, "k", k)
    if k.shape[1] == 0:
        raise ValueError(f"k: expected at least one key, got {describe(k.shape)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float32, float64, bfloat16 or float16, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} to match q, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected it on {q.device} to match q, got {tensor.device}")
