"""Attention over groups against a loop in float64: values, gradients, tracing, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from group_masks import (
    BATCH,
    GROUPS,
    HEADS,
    MASKS,
    SIZE,
    as_pairs,
    attention_by_loop,
    existing,
    random_mask,
    random_qkv,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import u4d_fast
from u4d_fast import multi_stream_attention
from u4d_fast.reference.multi_stream_attention import neighbours, parts

REGISTERED = torch.ops.u4d_fast.multi_stream_attention.default
REGISTERED_GRAD = torch.ops.u4d_fast.multi_stream_attention_grad.default


# Values.


@pytest.mark.parametrize("name", MASKS)
def test_equals_a_loop(name: str) -> None:
    given, mask = random_qkv(1), MASKS[name]()
    expected = attention_by_loop(*given, as_pairs(mask))
    found = multi_stream_attention(*given, SIZE, mask)
    torch.testing.assert_close(found, expected)
    assert torch.equal(u4d_fast.reference.multi_stream_attention(*given, SIZE, mask), found)


@pytest.mark.parametrize(("heads", "dim", "size"), [(1, 1, 1), (5, 7, 3), (2, 33, 1), (1, 128, 2)])
def test_any_number_of_heads_channels_and_tokens(heads: int, dim: int, size: int) -> None:
    given, mask = random_qkv(2, shape=(BATCH, GROUPS * size, heads, dim)), random_mask(4)
    torch.testing.assert_close(multi_stream_attention(*given, size, mask), attention_by_loop(*given, mask))


@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
def test_strided_inputs(name: str) -> None:
    given, mask = random_qkv(3), MASKS[name]()
    expected = multi_stream_attention(*given, SIZE, mask)
    q, k, v = given
    every_other = torch.stack((v, v), -1).flatten(-2)[..., ::2]  # neighbouring channels are two apart
    from_layout = k.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    padded = torch.cat((q, q), 1)[:, : q.shape[1]]
    assert not any(x.is_contiguous() for x in (every_other, from_layout, padded))
    torch.testing.assert_close(multi_stream_attention(padded, from_layout, every_other, SIZE, mask), expected)


@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions_are_no_worse_than_torchs_masked_attention(name: str, dtype: torch.dtype) -> None:
    given, mask = random_qkv(4, dtype, (BATCH, GROUPS * 24, HEADS, 64)), MASKS[name]()
    exact = attention_by_loop(*(x.double() for x in given), as_pairs(mask))
    tokens = as_pairs(mask).repeat_interleave(24, 1).repeat_interleave(24, 2)[:, None]
    plain = scaled_dot_product_attention(*(x.transpose(1, 2) for x in given), attn_mask=tokens).transpose(1, 2)
    plain = plain.masked_fill(~tokens.any(-1).transpose(1, 2)[..., None], 0)
    found = multi_stream_attention(*given, 24, mask)
    assert found.dtype == dtype and found.shape == exact.shape
    floor = torch.finfo(dtype).eps / 4
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor
    assert (found - exact).norm() <= 2 * (plain - exact).norm() + floor


@pytest.mark.parametrize("shape", [(0, 20, 3, 6), (2, 0, 3, 6), (2, 20, 0, 6), (2, 20, 3, 0)])
@pytest.mark.parametrize("mask_dims", [0, 1, 2])
def test_nothing_in_nothing_out(shape: tuple[int, ...], mask_dims: int) -> None:
    given = [x.requires_grad_() for x in random_qkv(5, shape=shape)]
    groups = shape[1] // SIZE
    mask = torch.ones(shape[0], *[groups] * mask_dims, dtype=torch.bool) if mask_dims else None
    found = multi_stream_attention(*given, SIZE, mask)
    assert found.shape == shape
    assert all(grad.shape == shape for grad in torch.autograd.grad(found.sum(), given))


# What is not seen.


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_query_that_sees_nothing_gives_zeros_and_harmless_gradients(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(6, dtype)
    blind = slice(SIZE, 2 * SIZE)
    q[0, blind] = torch.finfo(dtype).max  # the sum of these is inf
    q[0, blind.start] = torch.nan
    given = [x.requires_grad_() for x in (q, k, v)]
    out = multi_stream_attention(*given, SIZE, random_mask(5))
    assert out.isfinite().all() and out[0, : SIZE // 2].any() and not out[0, blind].any()
    grads = torch.autograd.grad(out.square().sum(), given)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
    assert not grads[0][0, blind].any()


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_exist_where_nobody_sees_anything(dims: int) -> None:
    given = [x.requires_grad_() for x in random_qkv(7)]
    mask = torch.zeros(BATCH, *[GROUPS] * (dims - 1), dtype=torch.bool)
    grads = torch.autograd.grad(multi_stream_attention(*given, SIZE, mask).sum(), given)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["existing", "pairs 0"])
def test_what_nobody_sees_is_not_even_read(name: str) -> None:
    given, mask = random_qkv(8), MASKS[name]()
    hidden = ~as_pairs(mask).any(1).repeat_interleave(SIZE, 1)
    assert hidden.any()
    poisoned = [x.clone() for x in given]
    poisoned[1][hidden], poisoned[2][hidden] = torch.nan, torch.inf
    results = []
    for inputs in (given, poisoned):
        leaves = [x.requires_grad_() for x in inputs]
        out = multi_stream_attention(*leaves, SIZE, mask)
        results.append([out, *torch.autograd.grad(out.cos().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][2][hidden].any() and not results[1][3][hidden].any()


def test_a_nan_reaches_those_who_see_it_and_nobody_else() -> None:
    (q, k, v), mask = random_qkv(9), random_mask(6)
    v[:, :SIZE] = torch.nan
    reached = multi_stream_attention(q, k, v, SIZE, mask).isnan().flatten(2).any(-1)
    assert torch.equal(reached, mask[:, :, 0].repeat_interleave(SIZE, 1))
    assert reached.any() and not reached.all()


# Gradients.


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("dims", [0, 2, 3])
def test_gradients(dims: int, registered: bool) -> None:
    given = [x.requires_grad_() for x in random_qkv(10, shape=(2, 6, 2, 3))]
    mask = {
        0: None,
        2: torch.tensor([[True, False, True], [False, True, True]]),
        3: torch.tensor([[[1, 0, 1], [0, 0, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 0], [1, 1, 0]]]).bool(),
    }[dims]
    op = REGISTERED if registered else multi_stream_attention
    assert torch.autograd.gradcheck(lambda *qkv: op(*qkv, 2, mask), given)


@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
def test_registered_op_keeps_torchs_rules(name: str) -> None:
    given, mask = random_qkv(11, torch.float32), MASKS[name]()
    torch.library.opcheck(REGISTERED, (*(x.requires_grad_() for x in given), SIZE, mask))
    constants = [x.detach() for x in given]
    torch.library.opcheck(REGISTERED_GRAD, (torch.ones_like(constants[0]), *constants, SIZE, mask))
    with sdpa_kernel(SDPBackend.MATH):  # whose result has another layout than the one that tracing is told
        assert REGISTERED(*constants, SIZE, mask).is_contiguous()


# Tracing.


@pytest.mark.parametrize(("backend", "dynamic"), [("eager", False), ("aot_eager", True)])
@pytest.mark.parametrize("dims", [0, 2, 3])
def test_compiles_whole_with_gradients(dims: int, backend: str, dynamic: bool) -> None:
    def length(mask: Tensor | None, *qkv: Tensor) -> Tensor:
        return multi_stream_attention(*qkv, SIZE, mask).cos().sum()

    torch.compiler.reset()  # graphs of the other cases count towards the limit of recompilations
    compiled = torch.compile(length, fullgraph=True, backend=backend, dynamic=dynamic)
    given = [x.requires_grad_() for x in random_qkv(12)]
    for seed in range(2):  # the second mask meets a graph that was made with the first
        mask = {0: None, 2: existing(seed), 3: random_mask(seed)}[dims]
        expected = torch.autograd.grad(length(mask, *given), given)
        for a, b in zip(torch.autograd.grad(compiled(mask, *given), given), expected, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(mask, *given), length(mask, *given))


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return multi_stream_attention(q, k, v, SIZE, mask)


def test_exported_without_a_mask_is_torchs_own_attention() -> None:
    given = tuple(random_qkv(13, torch.float32))
    program = torch.export.export(Attention(), given)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.transpose.int", "aten.scaled_dot_product_attention.default"}
    assert torch.equal(program.module()(*given), multi_stream_attention(*given, SIZE))


def test_exported_with_a_mask_is_the_op_and_takes_any_mask() -> None:
    given = random_qkv(14, torch.float32)
    program = torch.export.export(Attention(), (*given, random_mask(0)))
    assert REGISTERED in {node.target for node in program.graph.nodes}
    for mask in (random_mask(0), random_mask(1)):
        assert torch.equal(program.module()(*given, mask), multi_stream_attention(*given, SIZE, mask))


# The plan, and what is refused.


def test_the_plan_is_runs_of_neighbours() -> None:
    assert neighbours([0, 1, 4]) == ((0, 2), (4, 5)) and neighbours([1, 2, 4], 3) == ((3, 9), (12, 15))
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
    same, blind = parts(mask.numpy().tobytes(), 3, 10)
    assert same.queries == ((0, 10), (20, 30)) and same.keys == ((0, 20),)
    assert blind.queries == ((10, 20),) and blind.keys == ()


# What is chosen and what is refused.


def test_there_is_no_cpu_kernel_and_that_is_told() -> None:
    given = random_qkv(18, torch.float32)
    assert torch.equal(multi_stream_attention(*given, SIZE, backend="reference"), multi_stream_attention(*given, SIZE))
    told = u4d_fast.info()["ops"]["multi_stream_attention"]["cpu"]
    reason = "the compiled module has no CPU kernel of multi_stream_attention"
    assert told == {"backend": "reference", "reason": reason}
    with pytest.raises(u4d_fast.BackendError, match=f"backend 'cpu' cannot run: {reason}"):
        multi_stream_attention(*given, SIZE, backend="cpu")
    with pytest.raises(u4d_fast.BackendError, match="'cuda' was asked for, but the tensors are on cpu"):
        multi_stream_attention(*given, SIZE, random_mask(0), backend="cuda")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 20, 18)}, ValueError, r"q: expected \[B,T,heads,d\], got \[2,20,18\]"),
        ({"k": torch.zeros(2, 16, 3, 6)}, ValueError, r"k: expected \[2,20,3,6\] to match q .*, got \[2,16,3,6\]"),
        ({"v": torch.zeros(2, 20, 1, 6)}, ValueError, r"v: expected \[2,20,3,6\] to match q .*, got \[2,20,1,6\]"),
        ({"v": None}, TypeError, "v: expected a tensor"),
        ({"q": torch.zeros(2, 20, 3, 6).long()}, TypeError, r"q: expected float32, .* got torch\.int64"),
        (
            {"k": torch.zeros(2, 20, 3, 6).half()},
            TypeError,
            r"k: expected torch\.float32 to match q, got torch\.float16",
        ),
        ({"group_size": 3}, ValueError, r"q: expected .* T a multiple of group_size 3, got \[2,20,3,6\]"),
        ({"group_size": 0}, ValueError, "group_size: expected at least 1 token, got 0"),
        (
            {"group_mask": torch.ones(2, 6).bool()},
            ValueError,
            r"group_mask: expected \[2,5\] or \[2,5,5\] to match q \[2,20,3,6\] in groups of 4, got \[2,6\]",
        ),
        ({"group_mask": torch.ones(1, 5, 5).bool()}, ValueError, r"group_mask: expected .* got \[1,5,5\]"),
        ({"group_mask": torch.ones(2, 5, 5)}, TypeError, r"group_mask: expected bool, got torch\.float32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = random_qkv(19, torch.float32)
    with pytest.raises(error, match=message):
        multi_stream_attention(**{"q": q, "k": k, "v": v, "group_size": SIZE, "group_mask": None} | change)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
@pytest.mark.parametrize("mask_device", ["cpu", "cuda"])
def test_on_a_gpu_with_the_mask_on_either_side(name: str, mask_device: str) -> None:
    given, mask = random_qkv(20, torch.float32, (BATCH, GROUPS * SIZE, HEADS, 64)), MASKS[name]()
    expected = attention_by_loop(*(x.double() for x in given), as_pairs(mask))
    on_gpu = [x.cuda() for x in given]
    there = None if mask is None else mask.to(mask_device)
    found = multi_stream_attention(*on_gpu, SIZE, there)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-3, atol=1e-3)
    compiled = torch.compile(multi_stream_attention, fullgraph=True, backend="aot_eager")(*on_gpu, SIZE, there)
    torch.testing.assert_close(compiled, found, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_mask_on_the_host_is_not_waited_for() -> None:
    given = [x.cuda() for x in random_qkv(21, torch.bfloat16, (BATCH, GROUPS * SIZE, HEADS, 64))]
    multi_stream_attention(*given, SIZE, random_mask(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        multi_stream_attention(*given, SIZE, random_mask(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
