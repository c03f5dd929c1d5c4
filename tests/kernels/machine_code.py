"""Compiles CUDA sources to machine code and takes it apart, on machines that have the tools."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from shim_compiler import ROOT, digest_of, with_includes

TARGET = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}"]
TOOLS = ("cuobjdump", "nvdisasm")  # the first calls the second


@dataclass(frozen=True)
class Usage:
    """What a kernel takes: registers, bytes of stack and of static shared memory; the most threads of its blocks."""

    registers: int
    stack: int
    shared: int
    threads: int | None


@dataclass(frozen=True)
class Exponentials:
    """How many of them a thread computes while tensor-core products are under way, and while none are."""

    under_way: int
    alone: int


@dataclass(frozen=True)
class MachineCode:
    """By kernel its usage and its instructions."""

    usage: dict[str, Usage]
    instructions: dict[str, list[str]]

    def count(self, name: str) -> int:
        """How many instructions there are whose name is `name`, or begins with `name` and a dot."""
        return sum(is_instruction(line, name) for lines in self.instructions.values() for line in lines)

    def exponentials(self, kernel: str) -> Exponentials:
        """As the instructions stand one after the other, each loop once.

        A last product of a group (gsb0) puts it under way; a wait leaves at most so many groups.
        """
        groups, counts = 0, [0, 0]
        for line in self.instructions[kernel]:
            if is_instruction(line, "[HQ]GMMA") and "gsb0" in line:
                groups += 1
            elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", line):
                groups = min(groups, int(wait[1], 16))
            elif is_instruction(line, "MUFU.EX2"):
                counts[groups == 0] += 1
        return Exponentials(*counts)

    def register_changes(self, kernel: str) -> list[int]:
        """What the kernel's setmaxnreg ask for, smallest first."""
        lines = [line for line in self.instructions[kernel] if is_instruction(line, "USETMAXREG")]
        return sorted(int(line.split(", ")[-1].split()[-1], 16) for line in lines)


def is_instruction(line: str, name: str) -> bool:
    return bool(re.match(rf"(?:@!?U?P\d+ )?{name}\b", line))


def nvcc() -> str:
    """The compiler; the test is skipped where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("needs nvcc, to compile for sm_90a; none was found")
    return str(Path(found).resolve())


def tools() -> str:
    """The folder with cuobjdump and nvdisasm; the test is skipped where they are not."""
    spec = importlib.util.find_spec("nvidia")
    folders = [
        path / "bin" for place in (spec and spec.submodule_search_locations) or [] for path in Path(place).glob("cu*")
    ]
    for folder in [*map(str, folders), *os.environ.get("PATH", "").split(os.pathsep)]:
        if all(shutil.which(tool, path=folder) for tool in TOOLS):
            return folder
    pytest.skip("needs cuobjdump and nvdisasm (requirements/dev.txt), to read machine code; they were not found")


def flags() -> list[str]:
    """The options that csrc/CMakeLists.txt compiles CUDA with, and what CMake adds."""
    text = (ROOT / "csrc" / "CMakeLists.txt").read_text()
    (given,) = re.findall(r"\$<\$<COMPILE_LANGUAGE:CUDA>:([^>]*)>", text)
    return [*given.split(), *TARGET]


def compile_source(source: Path) -> tuple[Path, str]:
    """A .cu file as a cubin, with what ptxas said; kept under build/ until a source or an option changes."""
    compiler, options = nvcc(), [*flags(), "-Xptxas", "-v"]
    files = [path for path in with_includes([source]) if "shim" not in path.name]
    target = ROOT / "build" / "machine_code" / f"{source.stem}-{digest_of(files, compiler, *options)}.cubin"
    log = target.with_suffix(".log")
    if not log.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler, *options, "-cubin", "-o", str(partial), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} does not compile:\n{done.stdout}{done.stderr}"
        partial.rename(target)
        log.write_text(done.stdout + done.stderr)
    return target, log.read_text()


def gpu_library(source: Path) -> ctypes.CDLL:
    """A .cu file as a library for the GPU of this machine; what it wants of libcuda is found when it is loaded."""
    compiler, options = nvcc(), ["-O3", "-w", *TARGET, "-shared", "-Xcompiler", "-fPIC"]
    target = ROOT / "build" / "machine_code" / f"{source.stem}-{digest_of(with_includes([source]), *options)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *options, "-o", str(partial), str(source)], check=True)
        partial.rename(target)
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(target))


def built_object(source: Path) -> Path | None:
    """What the build in this tree made of a .cu file, with the same options; None where it is older than the source."""
    within = source.relative_to(ROOT / "csrc") if source.is_relative_to(ROOT / "csrc") else source
    target = ROOT / "build/kernels/csrc/CMakeFiles" / f"kernels_{source.parent.name}.dir" / f"{within}.o"
    if not target.exists():
        return None
    newest = max(path.stat().st_mtime for path in with_includes([source]))
    return target if target.stat().st_mtime > newest else None


def machine_code(source: Path) -> MachineCode:
    """A .cu file compiled and taken apart."""
    folder = tools()
    binary = built_object(source) or compile_source(source)[0]
    known = ROOT / "build" / "machine_code" / f"{source.stem}-{digest_of([binary])}.json"
    if not known.exists():
        usage = read_usage(dump(folder, binary, "-res-usage"), dump(folder, binary, "-elf"))
        instructions = read_instructions(dump(folder, binary, "-sass"))
        known.parent.mkdir(parents=True, exist_ok=True)
        partial = known.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps([{name: asdict(x) for name, x in usage.items()}, instructions]))
        partial.rename(known)
    usage, instructions = json.loads(known.read_text())
    return MachineCode({name: Usage(**x) for name, x in usage.items()}, instructions)


def dump(folder: str, binary: Path, what: str) -> str:
    path = os.pathsep.join([folder, os.environ.get("PATH", "")])
    command = [f"{folder}/cuobjdump", what, str(binary)]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True).stdout


def read_usage(usage: str, elf: str) -> dict[str, Usage]:
    """From `cuobjdump -res-usage` and `-elf`."""
    bounds = re.findall(r"^\.nv\.info\.(\S+)$(.*?)(?=^\.|\Z)", elf, re.MULTILINE | re.DOTALL)
    threads = {}
    for name, text in bounds:
        found = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(\S+) (\S+) (\S+)", text)
        threads[name] = int(found[1], 16) * int(found[2], 16) * int(found[3], 16) if found else None
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return {name: Usage(*map(int, numbers), threads.get(name)) for name, *numbers in re.findall(pattern, usage)}


def read_instructions(sass: str) -> dict[str, list[str]]:
    """From `cuobjdump -sass`: by kernel, without addresses and encodings."""
    kernels = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)[1:]
    line = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", re.MULTILINE)
    return {name: line.findall(text) for name, text in zip(kernels[::2], kernels[1::2], strict=True)}
