"""Attention whose gradient has a kernel of its own, as torch sees it: the op with a second result, on the CPU.

The kernels run in the emulation of Hopper's instructions, called as on a GPU.
"""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch
from group_masks import BATCH, GROUPS, HEADS, MASKS, SIZE, as_pairs, random_mask, random_qkv
from shim_compiler import op_library
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from u4d_fast import attention_grads as grad_ops
from u4d_fast import backend as backends
from u4d_fast.ops import multi_stream_attention as forward_ops
from u4d_fast.reference import multi_stream_attention as reference_attention

WITH_LSE = torch.ops.u4d_fast.multi_stream_attention_with_lse.default
GRAD = torch.ops.u4d_fast.multi_stream_attention_grad.default


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels are there, for tensors on the CPU; the list gets the names of those that run."""
    called: list[str] = []

    def call(op: str, device: torch.device, *arguments: int) -> None:
        called.append(op)
        library = op_library(op)
        assert getattr(library, f"{op}_cuda")(None, *(ctypes.c_int64(x) for x in arguments)) == 0

    monkeypatch.setattr(backends, "call", call)
    for module in (forward_ops, grad_ops):
        monkeypatch.setattr(module, "kernel_runs", lambda op, q: True)
    return called


def length(mask: Tensor | None, size: int, *qkv: Tensor) -> Tensor:
    return WITH_LSE(*qkv, size, mask)[0].float().cos().sum()


def exact_lse(q: Tensor, k: Tensor, size: int, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    seen = as_pairs(mask).repeat_interleave(size, 1).repeat_interleave(size, 2)
    return scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)


# By the reference.


def test_what_the_kernels_do_not_take_goes_to_the_reference(emulated: list[str]) -> None:
    """A saved program may bring another head dim than it was traced with."""
    qkv, mask = [x.requires_grad_() for x in random_qkv(2, torch.bfloat16)], random_mask(1)
    found = torch.autograd.grad(length(mask, SIZE, *qkv), qkv)
    expected = torch.autograd.grad(reference_attention(*qkv, SIZE, mask).float().cos().sum(), qkv)
    assert not emulated and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", MASKS)
def test_the_references_second_result(name: str) -> None:
    (q, k, v), mask = random_qkv(1), MASKS[name]()
    out, lse = WITH_LSE(q, k, v, SIZE, mask)
    assert torch.equal(out, reference_attention(q, k, v, SIZE, mask)) and out.is_contiguous()
    torch.testing.assert_close(lse.double(), exact_lse(q, k, SIZE, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [0, 3])
def test_the_op_keeps_torchs_rules(dims: int) -> None:
    given = random_qkv(2, torch.float32)
    mask = random_mask(0) if dims else None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(WITH_LSE, (*(x.requires_grad_() for x in given), SIZE, mask), test_utils=tests)
    constants = [x.detach() for x in given]
    out, lse = WITH_LSE(*constants, SIZE, mask)
    torch.library.opcheck(GRAD, (out, *constants, SIZE, mask, out, lse), test_utils=tests[:3])


def test_gradients_by_the_reference() -> None:
    given = [x.requires_grad_() for x in random_qkv(3, shape=(2, 6, 2, 3))]
    mask = torch.tensor([[[1, 0, 1], [0, 0, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 0], [1, 1, 0]]]).bool()
    assert torch.autograd.gradcheck(lambda *qkv: WITH_LSE(*qkv, 2, mask)[0], given)
    assert not WITH_LSE(*given, 2, mask)[1].requires_grad


@pytest.mark.parametrize("shape", [(0, 20, 3, 6), (2, 0, 3, 6), (2, 20, 0, 6), (2, 20, 3, 0)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    given = [x.requires_grad_() for x in random_qkv(4, shape=shape)]
    out, lse = WITH_LSE(*given, SIZE, None)
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])
    assert all(grad.shape == shape for grad in torch.autograd.grad(out.sum(), given))


# By the kernels.


def assert_right(found: tuple[Tensor, ...], given: list[Tensor], size: int, mask: Tensor | None) -> None:
    """Gradients of `length` against float64, and torch's in bfloat16 as the measure of error."""
    expected = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        attended = reference_attention(*leaves, size, mask)
        expected.append(torch.autograd.grad(attended.to(torch.promote_types(dtype, torch.float32)).cos().sum(), leaves))
    for ours, exact, plain in zip(found, *expected, strict=True):
        error, plain_error = ours.double() - exact, plain.double() - exact
        assert error.abs().max() <= 2 * plain_error.abs().max() + 1e-3
        assert error.norm() <= 2 * plain_error.norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("name", ["none", "existing", "pairs 0", "strided"])
def test_forward_and_backward_by_the_kernels(emulated: list[str], name: str) -> None:
    """In eager mode, with inputs and a gradient that the kernels can't read in place."""
    given, mask = random_qkv(5, torch.bfloat16, (BATCH, GROUPS * 24, HEADS, 64)), MASKS[name]()
    given[1] = given[1].transpose(1, 2).contiguous().transpose(1, 2)
    given[2] = torch.stack((given[2], given[2]), -1).flatten(-2)[..., ::2]
    leaves = [x.requires_grad_() for x in given]
    attended = WITH_LSE(*leaves, 24, mask)[0]
    found = torch.autograd.grad(attended.float().cos().sum(), leaves)
    assert emulated == ["multi_stream_attention", "multi_stream_attention_grad"]
    assert_right(found, given, 24, mask)
    constant = torch.autograd.grad(WITH_LSE(*leaves, 24, mask)[0].sum(), leaves)  # a stride of 0
    ones = torch.ones_like(attended)
    exact = torch.autograd.grad(reference_attention(*leaves, 24, mask), leaves, ones)
    for ours, plain in zip(constant, exact, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dims", [0, 2])
def test_compiled_graphs_run_the_kernels(emulated: list[str], dims: int) -> None:
    given = random_qkv(6, torch.bfloat16, (BATCH, GROUPS * 24, 1, 64))
    mask = MASKS["existing"]() if dims else None
    leaves = [x.requires_grad_() for x in given]
    expected = torch.autograd.grad(length(mask, 24, *leaves), leaves)
    torch.compiler.reset()  # graphs of the other cases count towards the limit of recompilations
    compiled = torch.compile(length, fullgraph=True, backend="aot_eager")
    emulated.clear()
    found = torch.autograd.grad(compiled(mask, 24, *leaves), leaves)
    assert emulated == ["multi_stream_attention", "multi_stream_attention_grad"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_only_what_is_wanted_gets_a_gradient(emulated: list[str]) -> None:
    q, k, v = random_qkv(7, torch.bfloat16, (BATCH, GROUPS * 24, 1, 64))
    attended, lse = WITH_LSE(q, k.requires_grad_(), v, 24, None)
    assert attended.requires_grad and not lse.requires_grad
    attended.float().sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
    with torch.no_grad():
        assert not WITH_LSE(q, k, v, 24, None)[0].requires_grad


@pytest.fixture
def chosen(emulated: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As `emulated`, and multi_stream_attention chooses the kernel."""
    monkeypatch.setattr(forward_ops, "_choose", lambda *arguments, **options: "cuda")
    return emulated


def attend(mask: Tensor | None, *qkv: Tensor) -> Tensor:
    return forward_ops.multi_stream_attention(*qkv, 24, mask).float().cos().sum()


@pytest.mark.parametrize("dims", [0, 3])
def test_where_the_kernel_is_chosen_its_gradient_is(chosen: list[str], dims: int) -> None:
    given = random_qkv(8, torch.bfloat16, (BATCH, GROUPS * 24, 1, 64))
    mask = random_mask(2) if dims else None
    with torch.no_grad():
        value = attend(mask, *given)
    leaves = [x.requires_grad_() for x in given]
    torch.compiler.reset()
    results = []
    for call in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        assert call(mask, *leaves) == value
        results.append(torch.autograd.grad(call(mask, *leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert chosen.count("multi_stream_attention_grad") == 2
    assert_right(results[0], given, 24, mask)


def test_activation_checkpointing_can_keep_the_results(chosen: list[str]) -> None:
    leaves = [x.requires_grad_() for x in random_qkv(9, torch.bfloat16, (BATCH, GROUPS * 24, 1, 64))]
    expected = torch.autograd.grad(attend(None, *leaves), leaves)
    chosen.clear()
    kept = partial(create_selective_checkpoint_contexts, [WITH_LSE])
    value = checkpoint(attend, None, *leaves, use_reentrant=False, context_fn=kept)
    found = torch.autograd.grad(value, leaves)
    assert chosen == ["multi_stream_attention", "multi_stream_attention_grad"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
