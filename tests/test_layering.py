"""Who may import whom: the floors of the house, read from the sources themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
U4D = ROOT / "python" / "u4d"
U4D_FAST = ROOT / "u4d_fast"
KERNELS = ROOT / "csrc" / "kernels"

STANDARD = sys.stdlib_module_names
HEAVY = {"diffusers", "matplotlib", "av", "PIL", "transformers", "scipy", "skimage", "evo", "pandas", "tensorboard"}

# What the folders of u4d may import from each other. Files of the package's root are open to all floors from the model
# upwards; the lowest floors may know errors only. The observation spec is the language in which every task is asked
# for, so whoever builds on the model may speak it. Saving a scene folder also draws its pictures, when it is done.
OPEN = {"u4d.errors"}
PUBLIC = {"u4d.sample.observation"}
INSIDE_FUNCTIONS = {"data": {"view"}}
MAY_IMPORT = {
    "geometry": set(),
    "diffusion": set(),
    "model": {"geometry", "diffusion"},
    "data": {"geometry"},
    "view": {"geometry", "data"},
    "sample": {"geometry", "diffusion", "model"},
    "train": {"geometry", "diffusion", "model", "data", "view"},
    "evaluate": {"geometry", "diffusion", "model", "data"},
    "export": {"geometry", "diffusion", "model"},
    "convert": {"geometry", "diffusion", "model"},
}

WITHOUT_CPU_KERNEL = {"multi_stream_attention", "multi_stream_attention_fp8", "grouped_linear"}
"""Ops that run on their reference on a CPU: torch's own attention and products are good there."""


def imports(path: Path, *, only_at_import: bool = False) -> set[str]:
    """Dotted names that a file imports; with `only_at_import` not those inside functions or `if TYPE_CHECKING`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from u4d.geometry import cameras` may name a module: both readings are kept.
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if only_at_import and (lazy or typing):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def folder_of(name: str) -> str | None:
    """ "u4d.model.streams" -> "model"; None for files of the package's root and for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "u4d" and len(parts) > 1 and (U4D / parts[1]).is_dir() else None


def within(name: str, modules: set[str]) -> bool:
    """Whether a dotted name is one of the modules or something in them."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_there_is_something_to_check() -> None:
    assert len(python_files(U4D)) > 20 and len(python_files(U4D_FAST)) > 10 and any(KERNELS.rglob("*.cu"))


@pytest.mark.parametrize("path", python_files(U4D_FAST), ids=lambda path: str(path.relative_to(ROOT)))
def test_u4d_fast_needs_torch_and_numpy_only(path: Path) -> None:
    assert roots(imports(path)) - STANDARD <= {"torch", "numpy", "u4d_fast"}


def test_references_know_only_references() -> None:
    for path in python_files(U4D_FAST / "reference"):
        ours = {name for name in imports(path) if name.startswith("u4d_fast")}
        allowed = ("u4d_fast.reference", "u4d_fast.time_layout", "u4d_fast.checks", "u4d_fast.fp8")
        assert all(name.startswith(allowed) for name in ours), path


@pytest.mark.parametrize("folder", ["geometry", "diffusion"])
def test_the_lowest_floors_need_torch_and_numpy_only(folder: str) -> None:
    for path in python_files(U4D / folder):
        assert roots(imports(path)) - STANDARD <= {"torch", "numpy", "u4d_fast", "u4d"}, path


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_floors_import_downwards(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    for path in python_files(U4D / folder):
        at_import = imports(path, only_at_import=True)
        for name in imports(path):
            other = folder_of(name)
            if other is not None and not within(name, PUBLIC):
                late = set() if name in at_import else INSIDE_FUNCTIONS.get(folder, set())
                assert other in allowed | late, f"{path.relative_to(ROOT)} imports {name}"
            elif name.startswith("u4d.") and folder in ("geometry", "diffusion"):
                assert within(name, OPEN), f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_below_the_command_line_imports_it() -> None:
    for path in python_files(U4D):
        if path.name == "cli.py" or "commands" in path.parts:
            continue
        names = imports(path)
        assert not any(within(name, {"u4d.cli", "u4d.commands"}) for name in names), path


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for path in python_files(U4D):
        # Classes that derive from diffusers' own; `import u4d` must not reach these files (next test).
        if "model" not in path.parts and path.name != "pipeline.py":
            assert not roots(imports(path, only_at_import=True)) & HEAVY, path


@pytest.mark.parametrize(
    ("package", "unwanted"), [("u4d", HEAVY), ("u4d_fast", HEAVY | {"u4d", "torch._dynamo", "torch._inductor"})]
)
def test_importing_a_package_is_quick(package: str, unwanted: set[str]) -> None:
    code = f"import {package}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stdout.split())


def includes(path: Path) -> set[str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return {line.split()[1].strip('<>"') for line in lines if line.startswith("#include ")}


def c_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def test_kernels_know_nobody() -> None:
    for path in c_files(KERNELS):
        for name in includes(path):
            assert not name.startswith(("torch", "ATen", "c10", "pybind11", "Python.h", "bindings/", "runtime/")), path
            if "/" in name:
                assert name.startswith(("kernels/common/", f"kernels/{path.parent.name}/")) or is_shared(name), path


def is_shared(name: str) -> bool:
    """An op may be built on another op's header, not on its sources."""
    return name.startswith("kernels/") and name.endswith((".h", ".cuh"))


def test_kernels_neither_allocate_nor_synchronise() -> None:
    banned = ("cudaMalloc", "cudaDeviceSynchronize", "cudaStreamSynchronize", "std::vector", "malloc(", "new float")
    for path in c_files(KERNELS):
        if "shim" not in path.name:  # these run in tests only
            assert not any(word in path.read_text() for word in banned), path


def test_bindings_know_kernels_and_no_torch() -> None:
    for path in c_files(ROOT / "csrc" / "bindings"):
        for name in includes(path):
            assert not name.startswith(("torch", "ATen", "c10", "runtime/")), path


def test_one_name_on_every_floor() -> None:
    """An op has a reference, checks, a contract, a CPU and a CUDA kernel, a binding, tests and a benchmark."""
    ops = {path.stem for path in (U4D_FAST / "ops").glob("*.py") if path.stem != "__init__"}
    assert len(ops) >= 5 and ops >= WITHOUT_CPU_KERNEL
    for op in ops:
        for name in (
            f"u4d_fast/reference/{op}.py",
            f"csrc/kernels/{op}/{op}.h",
            f"csrc/kernels/{op}/{op}.cu",
            f"csrc/bindings/{op}.cpp",
            f"tests/kernels/test_{op}.py",
            f"benchmarks/bench_{op}.py",
        ):
            assert (ROOT / name).exists(), name
        assert (ROOT / f"csrc/kernels/{op}/{op}_cpu.cpp").exists() != (op in WITHOUT_CPU_KERNEL), op


def test_no_file_is_too_long_to_read() -> None:
    limits = {".py": 400, ".cu": 500, ".cpp": 500, ".h": 500, ".cuh": 500}
    folders = (U4D, U4D_FAST, ROOT / "csrc", ROOT / "benchmarks")
    for path in (path for folder in folders for path in folder.rglob("*")):
        limit = limits.get(path.suffix)
        assert limit is None or len(path.read_text().splitlines()) <= limit, path
