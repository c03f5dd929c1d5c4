"""Which implementation runs, who decides it, and what is said when it can't be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray_cameras import random_cameras

import u4d_fast
from u4d_fast import backend as backends


@pytest.fixture
def cameras() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    found = random_cameras(1, 3, (16, 24))
    return found.intrinsics.float(), found.cam_to_world.float(), torch.ones(1), (16, 24)


def spy_on_call(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are run from now on."""
    calls: list[str] = []
    real = backends.call

    def call(op: str, device: torch.device, *arguments: int | float) -> None:
        calls.append(f"{op}_{device.type}")
        real(op, device, *arguments)

    monkeypatch.setattr(backends, "call", call)
    return calls


def test_auto_takes_the_kernel_for_single_precision_on_the_cpu(cameras, monkeypatch) -> None:
    calls = spy_on_call(monkeypatch)
    u4d_fast.pack_rays(*cameras)
    assert calls == ["pack_rays_cpu"]


def test_auto_takes_the_reference_for_double(cameras, monkeypatch) -> None:
    calls = spy_on_call(monkeypatch)
    intrinsics, cam_to_world, scale, size = cameras
    ray_dir, _ = u4d_fast.pack_rays(intrinsics.double(), cam_to_world.double(), scale.double(), size)
    assert calls == [] and ray_dir.dtype == torch.float64


def test_an_op_says_which_dtypes_its_kernels_take() -> None:
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    taken = (torch.float32, torch.bfloat16)
    counts = torch.zeros(1, dtype=torch.int64)
    assert backends.resolve("pack_rays", "auto", half, single, counts, dtypes=taken) == "cpu"
    assert backends.resolve("pack_rays", "auto", half, double, dtypes=taken) == "reference"
    assert backends.resolve("pack_rays", "auto", half) == "reference"
    with pytest.raises(
        u4d_fast.BackendError, match=r"cannot run: the kernels take float32, bfloat16, got torch\.float64"
    ):
        backends.resolve("pack_rays", "cpu", half, double, dtypes=taken)


def test_the_reference_can_be_asked_for(cameras, monkeypatch) -> None:
    calls = spy_on_call(monkeypatch)
    u4d_fast.pack_rays(*cameras, backend="reference")
    with u4d_fast.use_backend("reference"):
        u4d_fast.pack_rays(*cameras)
        with u4d_fast.use_backend("cpu"):
            u4d_fast.pack_rays(*cameras)
        u4d_fast.pack_rays(*cameras)
        u4d_fast.pack_rays(*cameras, backend="cpu")
    assert calls == ["pack_rays_cpu", "pack_rays_cpu"]
    assert backends.default_backend() == "auto"


def test_an_argument_beats_the_default_even_when_the_block_fails(cameras) -> None:
    with pytest.raises(ValueError, match="image_size"), u4d_fast.use_backend("reference"):
        u4d_fast.pack_rays(*cameras[:3], (1, 2))
    assert backends.default_backend() == "auto"


@pytest.mark.parametrize("name", ["metal", "", "CPU"])
def test_unknown_names(cameras, name: str) -> None:
    with pytest.raises(u4d_fast.BackendError, match=f"expected one of auto, reference, cpu, cuda, got {name!r}"):
        u4d_fast.pack_rays(*cameras, backend=name)
    with pytest.raises(u4d_fast.BackendError, match="use_backend: expected one of"), u4d_fast.use_backend(name):
        pass


def test_a_backend_that_cannot_run_is_an_error_and_not_replaced(cameras) -> None:
    with pytest.raises(
        u4d_fast.BackendError, match="pack_rays: backend 'cuda' was asked for, but the tensors are on cpu"
    ):
        u4d_fast.pack_rays(*cameras, backend="cuda")
    double = [value.double() for value in cameras[:3]]
    with pytest.raises(
        u4d_fast.BackendError, match=r"backend 'cpu' cannot run: the kernels compute in float32, got torch\.float64"
    ):
        u4d_fast.pack_rays(*double, cameras[3], backend="cpu")
    with pytest.raises(u4d_fast.BackendError, match="cannot run"), u4d_fast.use_backend("cpu"):
        u4d_fast.pack_rays(*double, cameras[3])


def test_without_the_module_everything_runs_on_the_reference(cameras, monkeypatch) -> None:
    monkeypatch.setattr(backends, "kernels", None)
    monkeypatch.setattr(backends, "missing_reason", "not built")
    monkeypatch.setattr(backends, "_availability", {})
    expected = u4d_fast.reference.pack_rays(*cameras)
    assert all(torch.equal(a, b) for a, b in zip(u4d_fast.pack_rays(*cameras), expected, strict=True))
    with pytest.raises(u4d_fast.BackendError, match="cannot run: not built"):
        u4d_fast.pack_rays(*cameras, backend="cpu")
    # A saved program calls the registered op, on whatever machine it is loaded.
    found = torch.ops.u4d_fast.pack_rays(*cameras[:3], *cameras[3])
    assert torch.equal(found[0], expected[0])
    told = u4d_fast.info()
    assert told["kernels"]["built"] is False and told["ops"]["pack_rays"]["cpu"] == {
        "backend": "reference",
        "reason": "not built",
    }


def test_a_module_without_cuda_or_for_another_gpu_says_so(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_availability", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = {0: (9, 0), 1: (10, 0), 2: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(backends, "kernels", SimpleNamespace(cuda_arch=None, pack_rays_cpu=print))
    assert backends.unavailable("pack_rays", "cuda", 0) == "the compiled module was built without CUDA"
    assert backends.unavailable("pack_rays", "cpu", -1) == ""
    assert backends.unavailable("warp_frames", "cpu", -1) == "the compiled module has no CPU kernel of warp_frames"
    monkeypatch.setattr(backends, "_availability", {})
    built = SimpleNamespace(cuda_arch="sm_90a", hopper_ops=("attention",), pack_rays_cuda=print, attention_cuda=print)
    built.attention_fp8_cuda = print  # of the same folder
    monkeypatch.setattr(backends, "kernels", built)
    assert backends.unavailable("pack_rays", "cuda", 0) == backends.unavailable("attention", "cuda", 0) == ""
    # Portable kernels come as PTX too.
    assert backends.unavailable("pack_rays", "cuda", 1) == ""
    for op in ("attention", "attention_fp8"):
        assert backends.unavailable(op, "cuda", 1) == "the kernel is compiled for sm_90a, this GPU is sm_100"
    assert "compute capability 8.0 and newer, this GPU is sm_75" in backends.unavailable("pack_rays", "cuda", 2)
    assert "no kernels for device type 'mps'" in backends.unavailable("pack_rays", "mps", 0)


def test_kernels_with_hoppers_instructions_are_for_hopper_alone() -> None:
    """As PTX for other GPUs such a kernel would be built, and fail where it is loaded."""
    if getattr(backends.kernels, "cuda_arch", None) is None:
        pytest.skip("needs a module with CUDA; this one was built without")
    folders = (Path(__file__).parents[2] / "csrc" / "kernels").iterdir()
    sources = {folder.name: "".join(path.read_text() for path in folder.glob("*.cu*")) for folder in folders}
    theirs = {op for op, text in sources.items() if "hopper::" in text and op != "common"}
    assert set(backends.kernels.hopper_ops) == theirs and "multi_stream_attention" in theirs


def test_tensors_on_different_devices() -> None:
    with pytest.raises(ValueError, match="pack_rays: expected all tensors on one device, got cpu and meta"):
        backends.resolve("pack_rays", "auto", torch.zeros(1), torch.zeros(1, device="meta"))


def in_new_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "U4D_BACKEND"} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_variable() -> None:
    code = "import u4d_fast, json; i = u4d_fast.info(); print(json.dumps([i['backend'], i['ops']['pack_rays']['cpu']]))"
    told = in_new_process(code, U4D_BACKEND="reference")
    assert json.loads(told.stdout) == ["reference", {"backend": "reference", "reason": "asked for"}]
    wrong = in_new_process(code, U4D_BACKEND="fast")
    assert wrong.returncode != 0
    assert wrong.stderr.strip().endswith("U4D_BACKEND: expected one of auto, reference, cpu, cuda, got 'fast'")


def test_info_tells_what_is_active_and_why() -> None:
    told = u4d_fast.info()
    assert told["torch"] == torch.__version__ and told["threads"] >= 1
    left_to_torch = {"multi_stream_attention", "multi_stream_attention_fp8", "grouped_linear", "grouped_linear_fp8"}
    files = {path.stem for path in Path(u4d_fast.__file__).parent.glob("ops/*.py")} - {"__init__"}
    assert set(told["ops"]) == files | left_to_torch
    with_kernel = files - left_to_torch
    assert {"pack_rays", "rms_norm"} < with_kernel <= set(backends.kernels.ops) and told["kernels"]["built"]
    assert all(told["ops"][op]["cpu"]["backend"] == "reference" for op in left_to_torch)
    assert all(told["ops"][op]["cpu"] == {"backend": "cpu", "reason": ""} for op in with_kernel)
    with u4d_fast.use_backend("cuda"):
        active = u4d_fast.info()["ops"]["pack_rays"]["cpu"]
        assert active == {"backend": "none", "reason": "backend 'cuda' was asked for"}


def test_threads_are_torchs(cameras, monkeypatch) -> None:
    seen = []
    fake = SimpleNamespace(pack_rays_cpu=lambda threads, *rest: seen.append(threads))
    monkeypatch.setattr(backends, "kernels", fake)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    backends.call("pack_rays", torch.device("cpu"), 0)
    torch.set_num_threads(before)
    assert seen == [3]


@pytest.mark.parametrize("op", ["pack_rays", "unpack_rays"])
def test_kernels_refuse_sizes_that_break_their_contract(op: str) -> None:
    with pytest.raises(ValueError, match=f"{op}_cpu: sizes break the kernel's contract"):
        getattr(backends.kernels, f"{op}_cpu")(1, 0, 0, 0, 0, 0, 1, 50, 13, 2, 2)


def test_an_exported_program_holds_the_op() -> None:
    class Rays(torch.nn.Module):
        def forward(self, intrinsics, cam_to_world, scale):
            return u4d_fast.pack_rays(intrinsics, cam_to_world, scale, (16, 24))

    found = random_cameras(1, 6, (16, 24))
    given = (found.intrinsics.float(), found.cam_to_world.float(), torch.ones(1))
    program = torch.export.export(Rays(), given)
    assert torch.ops.u4d_fast.pack_rays.default in {node.target for node in program.graph.nodes}
    for a, b in zip(program.module()(*given), u4d_fast.pack_rays(*given, (16, 24)), strict=True):
        assert torch.equal(a, b)


def test_no_torch_in_the_module() -> None:
    """One build serves every torch: the module must not be linked to it."""
    path = backends.kernels.__file__
    with open(path, "rb") as file:
        content = file.read()
    assert b"libtorch" not in content and b"libc10" not in content
    code = f"""
import importlib.util, sys
sys.modules["torch"] = None  # importing torch would fail
spec = importlib.util.spec_from_file_location("_kernels", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.ops)
"""
    loaded = in_new_process(code)
    assert "pack_rays" in loaded.stdout, loaded.stderr
