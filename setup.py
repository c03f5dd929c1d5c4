"""Builds u4d_fast._kernels with CMake. Everything else about the package stands in pyproject.toml.

Environment:
    U4D_CUDA: "1" the CUDA sources are compiled or the build fails, "0" they are left out; unset: if nvcc is found.
    U4D_REQUIRE_KERNELS: "1" makes a build without C++ compiler fail, instead of installing pure Python.
    MAX_JOBS: parallel compiler processes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """`build_ext` that calls CMake once for the one extension module."""

    def finalize_options(self) -> None:
        self.given_build_temp = self.build_temp is not None
        super().finalize_options()

    def run(self) -> None:
        self.in_tree = self.inplace and not self.given_build_temp  # the base class clears `inplace` while it builds
        reason = why_not_buildable()
        if reason:
            if os.environ.get("U4D_REQUIRE_KERNELS") == "1":
                raise SystemExit(f"u4d: {reason}")
            print(f"u4d: {reason}: installing without compiled kernels; ops run on plain PyTorch", file=sys.stderr)
            for extension in self.extensions:  # an earlier build's would be packed in place of none
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # A kept folder for work in the tree, so that `make` and `pip install -e .` recompile only what changed.
        build = ROOT / "build" / "kernels" if self.in_tree else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        subprocess.run([*cmake, "-S", str(ROOT), "-B", str(build), *configuration()], check=True)
        subprocess.run([*cmake, "--build", str(build), "--parallel", jobs()], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next((build / "csrc").glob("_kernels.*.so")), target)


def configuration() -> list[str]:
    """CMake's arguments for this machine."""
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DU4D_CUDA={'ON' if wants_cuda() else 'OFF'}", *pybind11()]
    if wants_cuda():
        options.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
    ninja = find_program("ninja")
    if ninja:
        options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return options


def why_not_buildable() -> str:
    """What this machine lacks to compile anything; the empty string where nothing is lacking."""
    named = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(name) for name in named or ["c++", "g++", "clang++"]):
        return "no C++ compiler was found (install g++ or clang, or set CXX)"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        return f"Python's headers were not found in {headers} (Debian: install python3-dev)"
    return ""


def find_nvcc() -> str | None:
    """nvcc from CUDACXX, PATH, CUDA_HOME or the usual folder."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def wants_cuda() -> bool:
    choice = os.environ.get("U4D_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"U4D_CUDA: expected 0 or 1, got {choice!r}")
    if choice == "1" and find_nvcc() is None:
        raise SystemExit("U4D_CUDA=1 but nvcc was not found: put it on PATH or set CUDA_HOME")
    return choice != "0" and find_nvcc() is not None


def find_program(name: str) -> str | None:
    """A program on PATH or beside this Python."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def find_tool(name: str) -> list[str]:
    """A build tool as program, or as the Python package of that name (pip's build isolation puts it there)."""
    program = find_program(name)
    if program:
        return [program]
    if importlib.util.find_spec(name):
        return [sys.executable, "-m", name]
    raise SystemExit(f"u4d: {name} was not found: pip install {name}, or install without --no-build-isolation")


def pybind11() -> list[str]:
    """Where pybind11 is: its own package, or the copy of its headers that torch ships."""
    if importlib.util.find_spec("pybind11"):
        import pybind11 as package

        return [f"-Dpybind11_DIR={package.get_cmake_dir()}"]
    torch = importlib.util.find_spec("torch")
    for folder in (torch.submodule_search_locations or []) if torch else []:
        include = Path(folder) / "include"
        if (include / "pybind11" / "pybind11.h").exists():
            return [f"-DU4D_PYBIND11_INCLUDE={include}"]
    raise SystemExit("u4d: pybind11 was not found: pip install pybind11, or install without --no-build-isolation")


def jobs() -> str:
    return os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))


setup(ext_modules=[Extension("u4d_fast._kernels", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
