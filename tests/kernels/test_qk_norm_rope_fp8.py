"""qk_norm_rope_fp8 against the two ops it joins, and its kernels against float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from activations import DTYPES, activations, layouts
from block_rows import KERNELS, ORDERS, device_of, new_memory_is_nan
from fp8_checks import (
    assert_not_finite_rows,
    assert_refuses_gradients,
    assert_rows,
    assert_written,
    on_another_stream,
    same_bits,
)
from torch import Tensor

from u4d_fast.fp8 import Fp8Rows
from u4d_fast.ops.qk_norm_rope import qk_norm_rope
from u4d_fast.ops.qk_norm_rope_fp8 import qk_norm_rope_fp8
from u4d_fast.reference.qk_norm_rope import qk_norm_rope as reference_qk_norm_rope
from u4d_fast.reference.qk_norm_rope_fp8 import qk_norm_rope_fp8 as reference_qk_norm_rope_fp8
from u4d_fast.reference.quantize_rows import quantize_rows as reference_quantize_rows

HostShim = Callable[[str, str], AbstractContextManager[None]]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]

# (S, B, T, heads, d). Between them: a warp for a row with the last lanes idle, a block for a row, a head in one lane,
# heads that are no power of two, no whole vectors, or more than a warp of them; rows too wide to be held.
SIZES = [
    (4, 2, 5, 12, 128),
    (1, 1, 1, 1, 2),
    (2, 1, 3, 5, 24),
    (2, 1, 3, 5, 8),
    (1, 2, 2, 61, 128),
    (3, 1, 5, 3, 10),
    (1, 1, 2, 3, 512),
    (1, 1, 2, 9, 2048),
]


def given(size: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Arguments:
    """x, weight, cos, sin; one token is all zeros."""
    streams, batch, tokens, heads, head_dim = size
    width = heads * head_dim
    weight = 1 + activations((1, 1, streams, width), seed=1)[0, 0].clamp(-0.9, 2)
    angles = 10 * activations((1, 1, tokens, head_dim // 2), seed=2)[0, 0]
    x = activations((streams, batch, tokens, width), dtype)
    return x, weight.to(weight_dtype or dtype), angles.cos().float(), angles.sin().float()


def run(tensors: Arguments, heads: int, backend: str) -> Fp8Rows:
    """The op on the device of its backend."""
    return qk_norm_rope_fp8(*(tensor.to(device_of(backend)) for tensor in tensors), heads, backend=backend)


def check(found: Fp8Rows, tensors: Arguments, heads: int) -> None:
    exact = reference_qk_norm_rope(*(tensor.double() for tensor in tensors), heads)
    assert_rows(found, reference_qk_norm_rope_fp8(*tensors, heads), exact)


def test_reference_is_the_two_ops_one_after_the_other() -> None:
    for dtype in (*DTYPES, torch.float64):
        x, *rest = given(SIZES[0], dtype)
        wide = x if dtype == torch.float64 else x.float()
        expected = reference_quantize_rows(qk_norm_rope(wide, *rest, 12, backend="reference"))
        assert same_bits(reference_qk_norm_rope_fp8(x, *rest, 12), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_rows_are_as_near_as_e4m3_lets_be(backend: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    for weight_dtype in {dtype, torch.float32}:
        tensors = given(size, dtype, weight_dtype)
        check(run(tensors, size[3], backend), tensors, size[3])


@pytest.mark.parametrize("backend", KERNELS)
def test_any_memory_layout_and_no_rows(backend: str) -> None:
    x, weight, cos, sin = given((2, 3, 4, 3, 16), torch.bfloat16)
    tables = (cos.T.contiguous().T, torch.stack((sin, sin), -1)[..., 0])
    for same in layouts(x).values():
        check(run((same, weight, *tables), 3, backend), (x, weight, cos, sin), 3)
    for nothing in (x[:0], x[:, :0], x[:, :, :0]):
        few = (nothing, weight[: len(nothing)], cos[: nothing.shape[2]], sin[: nothing.shape[2]])
        found = run(few, 3, backend)
        assert found.values.shape == (nothing.shape[1], len(nothing) * nothing.shape[2], 3, 16)
        assert found.scale.shape == found.values.shape[:-1]


@pytest.mark.parametrize("backend", KERNELS)
def test_every_element_is_written_and_the_same_each_time(backend: str) -> None:
    for size in SIZES:
        tensors = given(size, torch.bfloat16)
        with new_memory_is_nan():
            first, second = run(tensors, size[3], backend), run(tensors, size[3], backend)
        assert_written(first)
        assert same_bits(first, second)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nan_stays_in_its_token(backend: str) -> None:
    tensors = given((2, 1, 3, 4, 16), torch.bfloat16)
    tensors[0][1, 0, 0, 5] = torch.nan
    rows = torch.zeros(1, 6, 4, dtype=torch.bool)
    rows[0, 3] = True
    assert_not_finite_rows(run(tensors, 4, backend), rows)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_source_on_the_host_shim(host_shim: HostShim, dtype: torch.dtype, order: str) -> None:
    for size in SIZES:
        tensors = given(size, dtype, torch.float32 if order == "reverse" else None)
        with host_shim("qk_norm_rope_fp8", order), new_memory_is_nan():
            found = run(tensors, size[3], "cpu")
        check(found, tensors, size[3])


@pytest.mark.gpu
def test_runs_on_the_callers_stream() -> None:
    x, *rest = (tensor.cuda() for tensor in given((4, 1, 420, 12, 128), torch.bfloat16))

    def op(x: Tensor, *, backend: str) -> Fp8Rows:
        return qk_norm_rope_fp8(x, *rest, 12, backend=backend)

    assert same_bits(on_another_stream(op, x), op(x, backend="cuda"))


# Torch and arguments.


def test_registered_op_keeps_torchs_rules() -> None:
    tensors = given((2, 1, 3, 2, 8), torch.bfloat16)
    torch.library.opcheck(torch.ops.u4d_fast.qk_norm_rope_fp8.default, (*tensors, 2, 1e-6))


def test_compiles_whole() -> None:
    tensors = given((2, 1, 3, 2, 8), torch.float32)
    compiled = torch.compile(lambda *a: qk_norm_rope_fp8(*a, 2), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*tensors), qk_norm_rope_fp8(*tensors, 2))


def test_gradients_are_refused() -> None:
    x, weight, cos, sin = given((2, 1, 3, 2, 8), torch.float32)
    assert_refuses_gradients(lambda x, weight: qk_norm_rope_fp8(x, weight, cos, sin, 2), x, weight)


def test_bad_arguments() -> None:
    x, weight, cos, sin = given((2, 1, 3, 2, 8), torch.float32)
    with pytest.raises(ValueError, match="heads: expected a divisor of D = 16 that leaves an even d, got 3"):
        qk_norm_rope_fp8(x, weight, cos, sin, 3)
    with pytest.raises(ValueError, match=r"cos: expected \[3,4\] to match x \[2,1,3,16\], got \[3,3\]"):
        qk_norm_rope_fp8(x, weight, cos[:, :3], sin, 2)
