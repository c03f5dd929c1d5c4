"""Dense attention: every backend gives the same answer or says why not, and `auto` takes what was measured."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from group_masks import attention_by_loop
from torch import Tensor
from torch.nn.attention import SDPBackend

from u4d_fast.attention_table import (
    Measured,
    bucket,
    forget_rankings,
    rankings,
    read_measured,
    save_measured,
    unmeasured,
    user_file,
)
from u4d_fast.backend import BackendError

# The package shows the function under the module's name.
dense = importlib.import_module("u4d_fast.dense_attention")
libraries = importlib.import_module("u4d_fast.attention_libraries")

SHAPE, KEYS = (2, 12, 3, 8), 7
CPU_BACKENDS = ("torch", "torch-flash", "torch-math")
MEASURED = Measured("cpu", "float32", 8, 12, 7, {"torch-math": 1.0, "torch": 2.0}, {"torch-flash": 3.0, "torch": 4.0})


def random_qkv(dtype: torch.dtype = torch.float32, device: str = "cpu", shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (shape[0], KEYS, *shape[2:]), (shape[0], KEYS, *shape[2:]))
    return [torch.randn(size, generator=generator).to(device, dtype) for size in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double().cpu() for x in (q, k, v))
    weights = torch.softmax(torch.einsum("bthd,blhd->bhtl", q, k) / q.shape[-1] ** 0.5, -1)
    return torch.einsum("bhtl,blhd->bthd", weights, v)


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads or writes another one's measurements, or those that ship."""
    monkeypatch.setenv("U4D_CACHE", str(tmp_path))
    monkeypatch.setattr("u4d_fast.attention_table.SHIPPED", tmp_path / "shipped.json")
    forget_rankings()
    yield
    forget_rankings()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What `auto` runs: names of libraries, or the order that torch is given."""
    seen: list[object] = []

    def note(name: str) -> object:
        library = libraries.LIBRARIES[name]
        return replace(library, run=lambda q, k, v: seen.append(name) or library.run(q, k, v))

    for name in ("torch", "u4d", "xformers"):
        monkeypatch.setitem(libraries.LIBRARIES, name, note(name))
    run = libraries.run_torch
    monkeypatch.setattr(dense, "run_torch", lambda q, k, v, order: seen.append(order[0]) or run(q, k, v, order))
    return seen


@pytest.mark.parametrize("backend", ("auto", *CPU_BACKENDS))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_backends_agree_with_attention_in_float64(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = random_qkv(dtype)
    attended = dense.dense_attention(q, k, v, backend=backend)
    assert attended.shape == q.shape and attended.dtype == dtype
    torch.testing.assert_close(attended.double(), exact(q, k, v), rtol=0, atol=tolerance)


def test_the_oracle_agrees_with_attention_as_a_loop() -> None:
    q = random_qkv(torch.float64)[0]
    torch.testing.assert_close(exact(q, q, q), attention_by_loop(q, q, q, torch.ones(2, 1, 1, dtype=torch.bool)))


@pytest.mark.parametrize("backend", ("auto", *CPU_BACKENDS))
def test_strided_and_empty_inputs(backend: str) -> None:
    q, k, v = random_qkv()
    strided = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]
    found = dense.dense_attention(*strided, backend=backend)
    torch.testing.assert_close(found.double(), exact(q, k, v), rtol=0, atol=1e-5)
    assert dense.dense_attention(q[:, :0], k, v, backend=backend).shape == (2, 0, 3, 8)
    assert dense.dense_attention(q[:0], k[:0], v[:0], backend=backend).shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("backend", ("auto", *CPU_BACKENDS))
def test_gradients(backend: str) -> None:
    q, k, v = (x.double().requires_grad_() for x in random_qkv())
    assert torch.autograd.gradcheck(lambda *qkv: dense.dense_attention(*qkv, backend=backend), (q, k, v))


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("auto", True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in CPU_BACKENDS)],
)
def test_compiles_into_one_graph_with_gradients(backend: str, dynamic: bool) -> None:
    save_measured(MEASURED)
    torch._dynamo.reset()
    compiled = torch.compile(dense.dense_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (12, 40):
        q, k, v = (x.requires_grad_() for x in random_qkv(shape=(2, tokens, 3, 8)))
        attended = compiled(q, k, v, backend=backend)
        torch.testing.assert_close(attended.double(), exact(q, k, v), rtol=0, atol=1e-5)
        expected = torch.autograd.grad(dense.dense_attention(q, k, v).sum(), (q, k, v))
        torch.testing.assert_close(torch.autograd.grad(attended.sum(), (q, k, v)), expected)


def test_every_backend_tells_whether_it_can_run() -> None:
    q, k, v = random_qkv()
    reasons = dense.attention_backends(q, k, v)
    assert tuple(reasons) == dense.ATTENTION_BACKENDS
    assert {name for name, reason in reasons.items() if not reason} == set(CPU_BACKENDS)
    assert "CUDA" in reasons["torch-cudnn"] and "CUDA" in reasons["u4d"]
    for name, package in (("flash-attn-2", "flash-attn"), ("flash-attn-4", "flash-attn-4"), ("xformers", "xformers")):
        assert f"pip install {package})" in reasons[name]


@pytest.mark.parametrize("backend", sorted(set(dense.ATTENTION_BACKENDS) - set(CPU_BACKENDS)))
def test_a_choice_that_cannot_be_met_is_an_error_with_the_reason(backend: str) -> None:
    q, k, v = random_qkv()
    with pytest.raises(BackendError, match=f"'{backend}' cannot run: ") as caught:
        dense.dense_attention(q, k, v, backend=backend)
    assert dense.attention_backends(q, k, v)[backend] in str(caught.value)


def test_other_mistakes_name_what_is_wrong() -> None:
    q, k, v = random_qkv()
    with pytest.raises(BackendError, match=r"expected auto or one of torch, .* got 'cudnn'"):
        dense.dense_attention(q, k, v, backend="cudnn")
    with pytest.raises(ValueError, match=r"q: expected \[B,T,heads,d\], got \[12,3,8\]"):
        dense.dense_attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"k: expected \[2,7,3,8\] to match q"):
        dense.dense_attention(q, k[:, :, :2], v)
    with pytest.raises(ValueError, match=r"v: expected \[2,7,3,8\] to match k"):
        dense.dense_attention(q, k, v[:, :3])
    with pytest.raises(ValueError, match="at least one key"):
        dense.dense_attention(q, k[:, :0], v[:, :0])
    with pytest.raises(TypeError, match=r"v: expected torch\.float32 to match q, got torch.float64"):
        dense.dense_attention(q, k, v.double())
    with pytest.raises(TypeError, match="q: expected float32, float64"):
        dense.dense_attention(q.int(), k, v)


def test_libraries_get_our_layout_and_may_give_more_than_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        seen.append((q.shape, k.shape, q.stride(-1)))
        return q + 1, None

    module = types.ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    libraries.load.cache_clear()
    q, k, v = random_qkv(torch.bfloat16)
    assert "can't be imported" in dense.attention_backends(q, k, v)["flash-attn-3"]
    module.flash_attn_func = attention
    libraries.load.cache_clear()
    assert "CUDA alone" in dense.attention_backends(q, k, v)["flash-attn-3"]
    q = torch.stack((q, q), -1)[..., 0]
    assert torch.equal(libraries.LIBRARIES["flash-attn-3"].run(q, k, v), q + 1)
    assert seen == [(SHAPE, k.shape, 1)]
    libraries.load.cache_clear()


def test_auto_without_measurements_is_torch(taken: list[object]) -> None:
    dense.dense_attention(*random_qkv())
    assert taken == ["torch"] and dense.fastest_backends(*random_qkv()) == ()


def test_auto_takes_what_was_fastest_here(taken: list[object]) -> None:
    save_measured(MEASURED)
    q, k, v = random_qkv()
    dense.dense_attention(q, k, v)
    dense.dense_attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        dense.dense_attention(q, k, v)
    assert taken == [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@pytest.mark.parametrize(
    "other",
    [{"dtype": "bfloat16"}, {"head_dim": 64}, {"tokens": 200}, {"keys": 200}, {"device": "NVIDIA H100 80GB HBM3"}],
)
def test_auto_leaves_other_measurements_alone(taken: list[object], other: dict[str, object]) -> None:
    save_measured(replace(MEASURED, **other))
    dense.dense_attention(*random_qkv())
    assert taken == ["torch"]


def test_auto_passes_over_what_cannot_run_now(taken: list[object]) -> None:
    times = {"u4d": 1.0, "xformers": 2.0, "a library of tomorrow": 3.0, "torch-cudnn": 4.0}
    save_measured(replace(MEASURED, forward_ms=times))
    q, k, v = random_qkv()
    torch.testing.assert_close(dense.dense_attention(q, k, v).double(), exact(q, k, v), rtol=0, atol=1e-5)
    assert taken == [SDPBackend.CUDNN_ATTENTION]


def test_measurements_replace_older_ones_of_the_same_bucket() -> None:
    save_measured(MEASURED)
    save_measured(replace(MEASURED, tokens=13))
    save_measured(replace(MEASURED, tokens=500))
    assert [row.tokens for row in read_measured(user_file())] == [13, 500]
    (mine, _), file = rankings("cpu", -1, torch.float32), user_file()
    assert mine.forward == ("torch-math", "torch") and mine.training == ("torch-flash", "torch")
    assert [path.name for path in file.parent.iterdir()] == ["attention.json"]


def test_the_users_own_measurements_come_before_those_that_ship(tmp_path: Path) -> None:
    save_measured(MEASURED)
    save_measured(replace(MEASURED, forward_ms={"torch": 1.0}), tmp_path / "shipped.json")
    assert [row.forward for row in rankings("cpu", -1, torch.float32)] == [("torch-math", "torch"), ("torch",)]


def test_cudnn_is_the_guess_on_hopper_where_nothing_was_measured(
    monkeypatch: pytest.MonkeyPatch, taken: list[object]
) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert unmeasured("cuda", 0, torch.bfloat16) == unmeasured("cuda", 0, torch.float16) == ("torch-cudnn",)
    assert unmeasured("cuda", 0, torch.float32) == unmeasured("cpu", -1, torch.bfloat16) == ()
    capability = (8, 0)
    assert unmeasured("cuda", 0, torch.bfloat16) == ()
    # Where cuDNN can't, torch goes on to the next.
    monkeypatch.setattr(dense, "unmeasured", lambda *where: ("torch-cudnn",))
    q, k, v = random_qkv()
    torch.testing.assert_close(dense.dense_attention(q, k, v).double(), exact(q, k, v), rtol=0, atol=1e-5)
    assert taken == [SDPBackend.CUDNN_ATTENTION]
    save_measured(MEASURED)
    with torch.no_grad():
        dense.dense_attention(q, k, v)
    assert taken[1:] == [SDPBackend.MATH]


@pytest.mark.parametrize("text", ["{", "{}", '{"measured": [{"gpu": 1}]}', "[]"])
def test_a_damaged_table_is_a_warning(text: str, taken: list[object]) -> None:
    user_file().write_text(text)
    with pytest.warns(UserWarning, match=r"attention\.json: no table of attention times"):
        dense.dense_attention(*random_qkv())
    assert taken == ["torch"]


def test_buckets_cover_all_lengths_once() -> None:
    for length in range(1, 3000):
        low, high = bucket(length)
        assert low <= length < high and bucket(high)[0] == high and bucket(low) == (low, high)
    assert bucket(16800) == (11586, 23171)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 600, 2, 128), (2, 333, 3, 64)])
@pytest.mark.parametrize("backend", dense.ATTENTION_BACKENDS)
def test_backends_on_a_gpu(backend: str, shape: tuple[int, ...]) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(torch.bfloat16, "cuda", shape))
    if backend == "u4d":
        k, v = (torch.randn_like(q).requires_grad_() for _ in range(2))
    reason = dense.attention_backends(q, k, v)[backend]
    if reason:
        with pytest.raises(BackendError):
            dense.dense_attention(q, k, v, backend=backend)
        pytest.skip(f"{backend}: {reason}")
    attended = dense.dense_attention(q, k, v, backend=backend)
    grads = torch.autograd.grad(attended.float().sum(), (q, k, v))
    leaves = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected = exact(*leaves)
    plain = [x.detach().requires_grad_() for x in (q, k, v)]
    baseline = dense.dense_attention(*plain, backend="torch-math")
    pairs = [
        (attended, baseline, expected),
        *zip(
            grads,
            torch.autograd.grad(baseline.float().sum(), plain),
            torch.autograd.grad(expected.sum(), leaves),
            strict=True,
        ),
    ]
    for found, same_precision, truth in pairs:
        error = (found.double().cpu() - truth).norm()
        assert error <= 2 * (same_precision.double().cpu() - truth).norm() + 1e-3 * truth.norm()
