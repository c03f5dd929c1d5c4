"""The attentions that can be had from torch, from other libraries and from us, each with the reason where it can't.

All take `[B,T,heads,d]` queries and `[B,L,heads,d]` keys and values. Optional libraries are imported when they are
first asked for.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from u4d_fast import backend as backends
from u4d_fast.ops.multi_stream_attention import multi_stream_attention
from u4d_fast.reference.multi_stream_attention import attend

HALF = (torch.bfloat16, torch.float16)
OURS_HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Library:
    """One way to compute dense attention.

    Attributes:
        run: `(q, k, v)` -> `[B,T,heads,d]`.
        why_not: `(q, k, v)` -> why it can't run them; the empty string where it can.
        traced: whether torch.compile can see through it without a break in the graph.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    why_not: Callable[[Tensor, Tensor, Tensor], str]
    traced: bool


# --- torch's own


def run_torch(q: Tensor, k: Tensor, v: Tensor, order: tuple[SDPBackend, ...]) -> Tensor:
    """torch's attention by the first of these implementations that can do it."""
    if len(order) == 1:
        with sdpa_kernel(order[0]):
            return attend(q, k, v)
    with sdpa_kernel(list(order), set_priority=True):
        return attend(q, k, v)


def why_not_torch(q: Tensor, k: Tensor, v: Tensor, kind: SDPBackend) -> str:
    """What torch says against one of its implementations."""
    if kind == SDPBackend.MATH:
        return ""
    if q.device.type == "cuda":
        return _why_not_torch_cuda(q, k, v, kind)
    if kind != SDPBackend.FLASH_ATTENTION:
        return f"torch has it for CUDA only, the tensors are on {q.device}"
    try:
        with sdpa_kernel(kind):
            # Shapes and dtypes decide on a CPU: torch's own choice costs microseconds.
            chosen = torch._fused_sdp_choice(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    except RuntimeError as error:
        return _first_sentence(str(error))
    return "" if chosen == kind.value else "torch takes another one for these tensors"


def _why_not_torch_cuda(q: Tensor, k: Tensor, v: Tensor, kind: SDPBackend) -> str:
    can_use = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    }[kind]
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kind), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = can_use(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False), True)
    if usable:
        return ""
    return "; ".join(_first_sentence(str(one.message)) for one in said) or "torch refuses it for these tensors"


def _first_sentence(text: str) -> str:
    """What torch says, without where in its sources it says so."""
    return " ".join(text.split(" (Triggered internally")[0].split("\n")[0].split()).rstrip(".")


# --- other libraries


@lru_cache(maxsize=8)
def load(module: str, name: str, source: str) -> tuple[Callable[..., Any] | None, str]:
    """A function of an optional library, or why it can't be had."""
    try:
        return getattr(importlib.import_module(module), name), ""
    except ModuleNotFoundError as error:
        return None, f"{error.name or module} is not installed ({source})"
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return None, f"{module}.{name} can't be imported: {_first_sentence(str(error))}"


@dataclass(frozen=True)
class OptionalLibrary:
    """A library that may be installed.

    Attributes:
        module, name: its function.
        source: where it is had from.
        capabilities: the first number of the compute capabilities that it has kernels for.
        largest: the largest head dimension.
        dtypes: what it takes.
    """

    module: str
    name: str
    source: str
    capabilities: tuple[int, ...]
    largest: int
    dtypes: tuple[torch.dtype, ...] = HALF

    def why_not(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Why it can't run these tensors."""
        _, reason = load(self.module, self.name, self.source)
        if reason:
            return reason
        if q.device.type != "cuda":
            return f"it runs on CUDA alone, the tensors are on {q.device}"
        if q.dtype not in self.dtypes:
            return f"it takes {' or '.join(str(dtype) for dtype in self.dtypes)}, got {q.dtype}"
        if q.shape[-1] > self.largest or q.shape[-1] % 8:
            return f"its head dimension is a multiple of 8 up to {self.largest}, got {q.shape[-1]}"
        major = torch.cuda.get_device_capability(q.device)[0]
        if major not in self.capabilities:
            return f"it has no kernels for compute capability {major}.x"
        return ""

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Some versions give the log-sum-exp beside the result: it is dropped."""
        function, _ = load(self.module, self.name, self.source)
        assert function is not None
        found = function(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)))
        attended: Tensor = found[0] if isinstance(found, tuple) else found
        return attended

    def library(self) -> Library:
        return Library(self.run, self.why_not, traced=False)


# --- ours


def run_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Our kernel, with all tokens as one group."""
    return multi_stream_attention(q, k, v, q.shape[1], backend="cuda")


def why_not_ours(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why our kernel can't run these tensors."""
    if q.device.type != "cuda":
        return f"our kernel is for CUDA alone, the tensors are on {q.device}"
    if q.shape != k.shape:
        return f"our kernel takes as many keys as queries, got {k.shape[1]} and {q.shape[1]}"
    if q.dtype != torch.bfloat16:
        return f"our kernel takes torch.bfloat16, got {q.dtype}"
    if q.shape[-1] not in OURS_HEAD_DIMS:
        return f"our kernel's head dimension is {' or '.join(map(str, OURS_HEAD_DIMS))}, got {q.shape[-1]}"
    return backends.unavailable("multi_stream_attention", "cuda", -1 if q.device.index is None else q.device.index)


TORCH_KINDS = {
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch-math": SDPBackend.MATH,
}
LIBRARIES: dict[str, Library] = {
    "torch": Library(attend, lambda q, k, v: "", traced=True),
    **{
        name: Library(partial(run_torch, order=(kind,)), partial(why_not_torch, kind=kind), traced=True)
        for name, kind in TORCH_KINDS.items()
    },
    "flash-attn-2": OptionalLibrary(
        "flash_attn", "flash_attn_func", "pip install flash-attn", (8, 9, 10, 12), 256
    ).library(),
    "flash-attn-3": OptionalLibrary(
        "flash_attn_interface", "flash_attn_func", "built from the folder hopper of flash-attention", (8, 9), 256
    ).library(),
    "flash-attn-4": OptionalLibrary(
        "flash_attn.cute", "flash_attn_func", "pip install flash-attn-4", (9, 10), 128
    ).library(),
    "xformers": OptionalLibrary(
        "xformers.ops",
        "memory_efficient_attention",
        "pip install xformers",
        (7, 8, 9, 10, 12),
        256,
        (*HALF, torch.float32),
    ).library(),
    "u4d": Library(run_ours, why_not_ours, traced=True),
}
"""Every backend by its name, in the order in which tables show them."""
