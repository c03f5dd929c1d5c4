"""Fixtures of the kernel tests."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from shim_compiler import op_library
from torch import Tensor

from u4d_fast import backend as backends

HostShim = Callable[[str, str], AbstractContextManager[None]]


@pytest.fixture
def host_shim(monkeypatch: pytest.MonkeyPatch) -> HostShim:
    """`with host_shim(op, order):` runs the op's CUDA source where the CPU kernel would run.

    `order` is "forward" or "reverse", the order in which the threads of a block take their turns. Ask for
    `backend="cpu"` inside.
    """

    @contextlib.contextmanager
    def run(op: str, order: str) -> Iterator[None]:
        library = op_library(op)
        library.u4d_shim_failure.restype = ctypes.c_char_p
        library.u4d_shim_last_thread_first({"forward": 0, "reverse": 1}[order])

        def call(name: str, device: torch.device, *arguments: int | float) -> None:
            as_c = [ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_double(a) for a in arguments]
            status = getattr(library, f"{name}_cuda")(ctypes.c_void_p(None), *as_c)
            if status != 0:
                raise ValueError(f"{name}: status {status} {library.u4d_shim_failure().decode()}".strip())

        with monkeypatch.context() as patch:
            patch.setattr(backends, "call", call)
            yield

    return run


@pytest.fixture
def outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write stays NaN, in e4m3 (bytes of 7f) too; a plan that is read unwritten is far off."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 0x7F if made.dtype == torch.uint8 else -(10**8))

    monkeypatch.setattr(torch, "empty", filled)
