"""Compiles CUDA sources for the CPU, through csrc/kernels/common/host_shim.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
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
    subprocess.run([compiler, *options(sources), *map(str, sources), "-o", str(partial)], check=True)
    partial.rename(target)
    return ctypes.CDLL(str(target))


def options(sources: list[Path]) -> list[str]:
    """How to compile: the emulation of matrix products is worth the optimiser's time, nothing else is."""
    level = "-O2" if KERNELS / "common" / "hopper.h" in with_includes(sources) else "-O1"
    return ["-std=c++17", level, "-shared", "-fPIC", "-w", "-DU4D_HOST_SHIM", f"-I{ROOT / 'csrc'}", "-x", "c++"]


def with_includes(sources: list[Path]) -> list[Path]:
    """These files and every file of the project that they include, and those include, ..."""
    found = dict.fromkeys(sources)
    for path in sources:
        for name in re.findall(r'#include "(kernels/[^"]+)"', path.read_text()):
            if (included := ROOT / "csrc" / name) not in found:
                found |= dict.fromkeys(with_includes([included]))
    return list(found)


def digest_of(files: list[Path], *settings: str) -> str:
    """A short name of what a compiler is given."""
    digest = hashlib.sha256(" ".join(settings).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cached_library(name: str, sources: list[Path]) -> ctypes.CDLL:
    """.cu files compiled for the CPU, kept under build/ until they or what they include changes."""
    target = ROOT / "build" / "host_shim" / f"{name}-{digest_of(with_includes(sources), *options(sources))}.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    return compile_for_cpu(sources, target)


def op_library(op: str) -> ctypes.CDLL:
    """The op's .cu files compiled for the CPU."""
    return cached_library(op, sorted((KERNELS / op).glob("*.cu")))
