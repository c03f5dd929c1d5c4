"""Compiles CUDA sources for the CPU, through csrc/kernels/common/host_shim.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"


def compile_for_cpu(sources: list[Path], target: Path) -> ctypes.CDLL:
    """Compile .cu files into a shared library and load it; the test is skipped where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler for the host shim; none was found")
    partial = target.with_suffix(f".{os.getpid()}")
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DU4D_HOST_SHIM", f"-I{ROOT / 'csrc'}", "-x", "c++"]
    subprocess.run([compiler, *options, *map(str, sources), "-o", str(partial)], check=True)
    partial.rename(target)
    return ctypes.CDLL(str(target))


def op_library(op: str) -> ctypes.CDLL:
    """The op's .cu files compiled for the CPU, kept under build/ until a kernel source changes."""
    sources = sorted((KERNELS / op).glob("*.cu"))
    digest = hashlib.sha256()
    for path in [*sources, *sorted(KERNELS.glob("*/*.h")), *sorted(KERNELS.glob("*/*.cuh"))]:
        digest.update(path.read_bytes())
    target = ROOT / "build" / "host_shim" / f"{op}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    return compile_for_cpu(sources, target)
