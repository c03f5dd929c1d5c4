"""The rule that kernels with rows of e4m3 as results are held to, and what every such op must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.fp8 import Fp8Rows

LARGEST = 448.0
ROUNDING = 2.0**-19
"""What float32 arithmetic may move a result by, over the largest of its row."""


def same_bits(one: Fp8Rows, other: Fp8Rows) -> bool:
    """Whether both are the same rows, bit by bit, wherever they lie; one NaN is as good as another."""
    pairs = [(one.values.float(), other.values.float()), (one.scale, other.scale)]
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


def bits(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32).cpu()


def assert_rows(found: Fp8Rows, plain: Fp8Rows, exact: Tensor) -> None:
    """The rule: as near to the truth as e4m3 lets be, and torch's own codes but where a value lies between two.

    Args:
        found: the kernel's rows.
        plain: the reference's, on a CPU.
        exact: the finite rows before they were quantised, in float64.
    """
    assert found.values.dtype == torch.float8_e4m3fn and found.scale.dtype == torch.float32
    assert found.values.shape == exact.shape and found.scale.shape == exact.shape[:-1]
    assert found.values.is_contiguous() and found.scale.is_contiguous()
    if not exact.numel():
        return
    values, scale = found.values.cpu().double(), found.scale.cpu().double()
    largest = exact.abs().amax(-1)
    torch.testing.assert_close(scale, torch.where(largest == 0, LARGEST, largest) / LARGEST, rtol=ROUNDING, atol=0)
    half_step = (values.abs().clamp(min=2.0**-6).log2().floor() - 4).exp2()
    error = (values - exact / scale[..., None]).abs()
    assert (error <= half_step + LARGEST * ROUNDING).all(), (error - half_step).max()
    different = (values != plain.values.double()).sum().item()
    assert different <= max(1, 0.001 * values.numel()), different / values.numel()


def assert_not_finite_rows(found: Fp8Rows, rows: Tensor) -> None:
    """`rows` [...] says which rows had NaN or infinity in them: those, and only those, are NaN throughout."""
    nan = found.values.float().isnan().cpu()
    assert torch.equal(found.scale.isnan().cpu(), rows) and torch.equal(nan, rows[..., None].expand_as(nan))


def assert_written(found: Fp8Rows) -> None:
    """Every element was written, where new memory is NaN."""
    assert found.values.float().isfinite().all() and found.scale.isfinite().all()


def on_another_stream(op: Callable[..., Any], *given: Tensor) -> Any:
    """The op's result on the GPU, from a stream that is not the default."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = op(*given, backend="cuda")
    stream.synchronize()
    return found


def assert_refuses_gradients(op: Callable[..., object], *given: Tensor) -> None:
    """With any argument that wants a gradient, and not under no_grad."""
    for wanted in range(len(given)):
        tensors = [tensor.clone().requires_grad_(number == wanted) for number, tensor in enumerate(given)]
        with pytest.raises(ValueError, match=r"has no gradients, but .* requires one; use torch\.no_grad\(\)"):
            op(*tensors)
        with torch.no_grad():
            op(*tensors)


def assert_compiles_to_one_call(
    monkeypatch: pytest.MonkeyPatch, name: str, op: Callable[..., Fp8Rows], *given: Tensor
) -> None:
    """torch.compile takes the op whole, calls its kernel and gives the same bits."""
    expected = op(*given)
    called: list[str] = []
    original = backends.call
    monkeypatch.setattr(backends, "call", lambda op, *rest: (called.append(op), original(op, *rest)))
    found = torch.compile(lambda *tensors: op(*tensors), fullgraph=True, backend="aot_eager")(*given)
    assert called == [name] and isinstance(found, Fp8Rows) and same_bits(found, expected)
