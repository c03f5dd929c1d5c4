"""The fp8 attention kernels on the CPU, through the emulation of Hopper's instructions, against their specification."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from attention_on_shim import ORDERS, as_c, bf16_qkv, exact_lse, mask_strides, plan_size, prepared_library
from group_masks import GROUPS, MASKS, as_pairs, random_mask
from shim_compiler import op_library
from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.ops.multi_stream_attention_fp8 import attention_fp8_with_lse
from u4d_fast.reference.multi_stream_attention import multi_stream_attention as exact_attention
from u4d_fast.reference.multi_stream_attention_fp8 import Quantized, multi_stream_attention_fp8, quantize, seen_tokens

OP = "multi_stream_attention_fp8"
KEY_TILE, SLICE = 128, 128
KEY_ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
GUARD = 64  # bytes behind every output


@dataclass(frozen=True)
class Attended:
    """What the kernels gave.

    Attributes:
        given: the quantised inputs in the specification's layout.
        out: [B,T,heads,d] bfloat16.
        lse: [B,heads,T] float32.
    """

    given: Quantized
    out: Tensor
    lse: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, mask: Tensor | None = None, order: int = 0, seed: int = 1
) -> Attended:
    """Run both CUDA sources on the CPU."""
    library = prepared_library(OP, order, seed)
    batch, tokens, heads, dim = q.shape
    groups, padded = tokens // group_size, -(-tokens // 16) * 16
    outputs = Outputs()
    seen = outputs.add(torch.uint8, batch, groups)
    extents = outputs.add(torch.int32, batch, heads, -(-tokens // SLICE), 3)
    q_values, q_scale = outputs.add(torch.uint8, *q.shape), outputs.add(torch.float32, batch, heads, tokens)
    k_values, v_values = outputs.add(torch.uint8, *q.shape), outputs.add(torch.uint8, batch, heads, dim, padded)
    head_scales = outputs.add(torch.float32, batch, heads, 3)
    plan = outputs.add(torch.int32, batch, plan_size(groups, group_size, mask is not None and mask.ndim == 3))
    out, lse = outputs.add(torch.bfloat16, *q.shape), outputs.add(torch.float32, batch, heads, tokens)

    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    masked = [group_size, mask, *mask_strides(mask)]
    written = [seen, extents, q_values, q_scale, k_values, v_values, head_scales]
    call(library.multi_stream_attention_fp8_quantize_cuda, q, k, v, *q.shape, *strides, *masked, *written)
    quantized = [q_values, q_scale, k_values, v_values, head_scales]
    call(library.multi_stream_attention_fp8_cuda, *quantized, *q.shape, *masked, plan, out, lse)
    outputs.check_guards()
    given = Quantized(
        as_float(q_values), q_scale.mT, as_float(k_values), head_scales[..., 0], in_order(v_values), head_scales[..., 1]
    )
    return Attended(given._replace(v=given.v[:, :tokens]), out, lse)


class Outputs:
    """Tensors that a kernel fills: floats start as NaN, and behind each is a guard that must stay."""

    def __init__(self) -> None:
        self.guards: list[Tensor] = []

    def add(self, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        memory = torch.full((size // 16 * 16 + 16 + GUARD,), 0x7F, dtype=torch.uint8)
        made = memory[:size].view(dtype).view(shape)
        if dtype.is_floating_point:
            made.fill_(torch.nan)
        self.guards.append(memory[size:])
        return made

    def check_guards(self) -> None:
        assert all((guard == 0x7F).all() for guard in self.guards), "a kernel wrote past the end of an output"


def call(function: ctypes._NamedFuncPointer, *arguments: Tensor | int | None) -> None:
    assert launch(function, *arguments) == 0, op_library(OP).u4d_shim_failure().decode()


def launch(function: ctypes._NamedFuncPointer, *arguments: Tensor | int | None) -> int:
    """The launcher's status."""
    return function(ctypes.c_void_p(None), *as_c([*arguments]))


def as_float(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def in_order(v_values: Tensor) -> Tensor:
    """`[B,heads,d,padded]` with the keys of each 16 in the kernel's order -> `[B,padded,heads,d]`."""
    batch, heads, dim, padded = v_values.shape
    sixteens = as_float(v_values).view(batch, heads, dim, padded // 16, 16)
    ordered = torch.empty_like(sixteens)
    ordered[..., KEY_ORDER] = sixteens
    return ordered.view(batch, heads, dim, padded).permute(0, 3, 1, 2)


def assert_right(given: list[Tensor], size: int, mask: Tensor | None, attended: Attended) -> None:
    """The inputs are quantised to the bit, their attention is as good as the specification's, and lse is exact."""
    q, k, v = given
    expected = quantize(q, k, v, seen_tokens(mask, size))
    for name, wanted, found in zip(expected._fields, expected, attended.given, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: n + text)
    scaled = [
        (expected.q * expected.q_scale[..., None]).double(),
        (expected.k * expected.k_scale[:, None, :, None]).double(),
        (expected.v * expected.v_scale[:, None, :, None]).double(),
    ]
    exact, specified = exact_attention(*scaled, size, mask), multi_stream_attention_fp8(q, k, v, size, mask)
    error, allowed = attended.out.double() - exact, specified.double() - exact
    assert error.abs().max() <= 2 * allowed.abs().max() + 1e-3
    assert error.norm() <= 1.2 * allowed.norm() + 1e-3 * exact.norm()
    lse = exact_lse(*scaled[:2], size, mask)
    blind = lse.isinf()
    assert torch.equal(attended.lse == -math.inf, blind) and not attended.out.transpose(1, 2)[blind].any()
    torch.testing.assert_close(attended.lse.double()[~blind], lse[~blind], rtol=1e-5, atol=1e-5)


def in_both_orders(given: list[Tensor], size: int, mask: Tensor | None) -> Attended:
    """The kernels' answer, which the order of the threads must not change by a bit."""
    first, second = (attend(*given, size, mask, order=order) for order in ORDERS)
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)
    assert all(torch.equal(a, b) for a, b in zip(first.given, second.given, strict=True))
    return first


@pytest.mark.parametrize(("name", "dim"), [(name, (64, 128)[i % 2]) for i, name in enumerate(MASKS)])
def test_every_mask(name: str, dim: int) -> None:
    given, mask = bf16_qkv(1, 2, GROUPS * 37, 1, dim), MASKS[name]()
    assert_right(given, 37, mask, in_both_orders(given, 37, mask))


@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (16, 128), (129, 128), (KEY_TILE, 64), (2 * KEY_TILE + 3, 128)])
def test_any_number_of_tokens(tokens: int, dim: int) -> None:
    given = bf16_qkv(2, 1, tokens, 2, dim)
    assert_right(given, tokens, None, in_both_orders(given, tokens, None))


@pytest.mark.parametrize("size", [1, 16, 100])
def test_any_group_size(size: int) -> None:
    given, mask = bf16_qkv(3, 2, GROUPS * size, 1, 64), random_mask(4)
    assert_right(given, size, mask, in_both_orders(given, size, mask))


@pytest.mark.parametrize("dim", [64, 128])
def test_scores_too_small_for_float32(dim: int) -> None:
    """The scales of q and k multiply to zero; what is hidden, with a score of -inf, must not become NaN."""
    (q, k, v), mask = bf16_qkv(12, 2, GROUPS * 30, 1, dim), random_mask(5)
    given = [q * 1e-20, k * 1e-30, v]
    assert_right(given, 30, mask, attend(*given, 30, mask))


def test_strided_inputs() -> None:
    given, mask = bf16_qkv(4, 2, GROUPS * 30, 2, 128), random_mask(5)
    expected = attend(*given, 30, mask)
    q, k, v = given
    packed = torch.stack((q, k), 3).unbind(3)  # q and k side by side
    by_head = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in (*packed, by_head))
    found = attend(*packed, by_head, 30, mask)
    assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)


def test_the_order_in_which_copies_come_changes_nothing() -> None:
    given, mask = bf16_qkv(5, 2, GROUPS * 90, 1, 128), random_mask(1)
    results = [attend(*given, 90, mask, order=seed % 2, seed=seed) for seed in range(4)]
    assert all(torch.equal(results[0].out, other.out) for other in results)
    assert all(torch.equal(results[0].lse, other.lse) for other in results)


@pytest.mark.parametrize(("name", "dim"), [("existing", 64), ("pairs 0", 128), ("pairs 1", 64), ("strided", 128)])
def test_what_nobody_sees_has_no_influence(name: str, dim: int) -> None:
    given, mask = bf16_qkv(6, 2, GROUPS * 25, 1, dim), MASKS[name]()
    hidden = ~as_pairs(mask).any(1).repeat_interleave(25, 1)
    assert hidden.any()
    expected = attend(*given, 25, mask)
    for poison in (torch.nan, torch.inf, 1000.0):
        q, k, v = (x.clone() for x in given)
        k[hidden], v[hidden] = poison, poison
        found = attend(q, k, v, 25, mask)
        assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_nan_reaches_those_who_see_it_and_nobody_else(which: str, poison: float, dim: int) -> None:
    """Keys of other groups stand on both sides of it in its tile, since 20 is no multiple of 16."""
    (q, k, v), mask = bf16_qkv(7, 2, GROUPS * 20, 1, dim), random_mask(6)
    (k if which == "k" else v)[:, 55] = poison
    attended = attend(q, k, v, 20, mask)
    reached = attended.out.isnan().flatten(2).any(-1)
    assert torch.equal(reached, mask[:, :, 2].repeat_interleave(20, 1)) and reached.any() and not reached.all()
    expected = multi_stream_attention_fp8(q, k, v, 20, mask)
    torch.testing.assert_close(attended.out, expected, rtol=2**-7, atol=5e-2, equal_nan=True)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_spoils_its_row_alone(poison: float) -> None:
    q, k, v = bf16_qkv(8, 1, 150, 1, 64)
    expected = attend(q, k, v, 150)
    q[0, 40, 0, 3] = poison
    found = attend(q, k, v, 150)
    assert found.out[0, 40].isnan().all() and found.lse[0, 0, 40].isnan()
    others = torch.arange(150) != 40
    assert torch.equal(found.out[:, others], expected.out[:, others])


@pytest.mark.parametrize("change", ["large", "zero", "tiny", "one large", "rising"])
def test_scores_of_any_size(change: str) -> None:
    q, k, v = bf16_qkv(9, 1, 300, 1, 64)
    rising = torch.linspace(-3, 3, 300)[:, None, None]
    q = {"large": 30 * q, "zero": 0 * q, "tiny": 1e-38 * q, "one large": q + 100 * (q > 2), "rising": q.abs()}[change]
    given = [q, (k.abs() * rising).to(k.dtype) if change == "rising" else k, v]
    assert_right(given, 300, None, attend(*given, 300))


def test_a_head_of_zeros() -> None:
    q, k, v = bf16_qkv(10, 1, 40, 2, 64)
    k[:, :, 0], v[:, :, 1] = 0, 0
    assert_right([q, k, v], 40, None, attend(q, k, v, 40))


def test_nothing_to_do_and_what_is_refused() -> None:
    given = bf16_qkv(11, 1, 12, 1, 64)
    for empty in ([x[:0] for x in given], [x[:, :0] for x in given], [x[:, :, :0] for x in given]):
        attend(*empty, 4)
    library, missing = op_library(OP), [None] * 7
    strides = [768, 64, 64] * 3
    mask = torch.ones(1, 2000, dtype=torch.bool)
    for sizes, group_size, status in (([1, 12, 1, 32], 4, -1), ([1, 12, 1, 64], 5, -1), ([1, 2000, 1, 64], 1, -2)):
        masked = [group_size, mask, *mask.stride(), 0]
        quantized = launch(
            library.multi_stream_attention_fp8_quantize_cuda, *given, *sizes, *strides, *masked, *missing
        )
        attended = launch(library.multi_stream_attention_fp8_cuda, *missing[:5], *sizes, *masked, *missing[:3])
        assert (quantized, attended) == (status, status)


@pytest.mark.parametrize("name", ["none", "existing", "pairs 0", "strided"])
def test_the_op_calls_the_kernels_as_they_are_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the op does on a GPU, with the emulation in the place of the compiled module."""
    library = op_library(OP)

    def call_emulated(op: str, device: torch.device, *arguments: int) -> None:
        given = [ctypes.c_void_p(x) if x > 2**32 else ctypes.c_int64(x) for x in arguments]
        assert getattr(library, f"{op}_cuda")(ctypes.c_void_p(None), *given) == 0

    monkeypatch.setattr(backends, "call", call_emulated)
    (q, k, v), mask = bf16_qkv(12, 2, GROUPS * 20, 2, 64), MASKS[name]()
    every_other = torch.stack((v, v), -1).flatten(-2)[..., ::2]  # can't be read in place
    expected = attend(q, k, v, 20, mask)
    out, lse = attention_fp8_with_lse(q, k, every_other, 20, mask)
    assert torch.equal(out, expected.out) and torch.equal(lse, expected.lse)
