"""What nvcc makes of the CUDA sources for sm_90a: no spills, no products in single file, tensor cores really used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from machine_code import Exponentials, MachineCode, compile_source, machine_code
from shim_compiler import KERNELS, with_includes

SOURCES = {path.stem: path for path in sorted(KERNELS.glob("*/*.cu"))}
REGISTERS, SHARED = 65536, 227 * 1024  # of a multiprocessor; of a block

# Bytes of local memory that a thread may take, where it is not 0: small matrices that are indexed at run time.
STACK = {"rays_to_cameras": 1312}


HOPPER = [name for name, path in SOURCES.items() if KERNELS / "common" / "hopper.h" in with_includes([path])]


@dataclass(frozen=True)
class Products:
    """What the large kernels of an op for Hopper are made of: 128 threads that bring data, 256 that compute.

    Attributes:
        instructions: of the tensor cores: HGMMA (bfloat16), QGMMA (e4m3).
        stores: whether results go out by the copy engine.
        under_way: the fewest exponentials of a thread that must run while products do, in each kernel.
        alone: the most that may run while none do: those of a row's first keys; None: does not matter.
    """

    instructions: tuple[str, ...]
    stores: bool = False
    under_way: int = 0
    alone: int | None = None


PRODUCTS = {
    "multi_stream_attention": Products(("HGMMA",), under_way=88, alone=90),
    "multi_stream_attention_fp8": Products(("QGMMA",), under_way=64, alone=66),
    "multi_stream_attention_grad": Products(("HGMMA",), under_way=32, alone=0),
    "grouped_linear": Products(("HGMMA", "QGMMA"), stores=True),
}
TENSOR_CORES = {"HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA"}
COMPUTING, BRINGING = 256, 128  # threads


def complaints(log: str) -> list[str]:
    """Lines in which ptxas tells of something it did not do as asked, each with a number of its own: C7508 (setmaxnreg
    ignored), C7510 (products serialised), C7517 and C7519 (waits and fences put in), ... and spills."""
    spilled = [
        line for line in log.splitlines() if "spill" in line and "0 bytes spill stores, 0 bytes spill loads" not in line
    ]
    return [line for line in log.splitlines() if "(C7" in line] + spilled


def too_much(code: MachineCode, stack: int = 0) -> list[str]:
    """Kernels that take more than a multiprocessor has, or more than `stack` bytes of local memory."""
    found = []
    for name, usage in code.usage.items():
        if usage.threads and (usage.registers + 7) // 8 * 8 * usage.threads > REGISTERS:
            found.append(f"{name}: {usage.registers} registers for each of {usage.threads} threads")
        if usage.shared > SHARED:
            found.append(f"{name}: {usage.shared} bytes of shared memory")
        if usage.stack > stack:
            found.append(f"{name}: {usage.stack} bytes of stack")
    return found


@pytest.mark.parametrize("name", HOPPER)  # for all, warnings of spills are errors of the build
def test_the_assembler_has_nothing_to_tell(name: str) -> None:
    _, log = compile_source(SOURCES[name])
    assert complaints(log) == []


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_lives_in_local_memory(name: str) -> None:
    code = machine_code(SOURCES[name])
    assert {*code.usage} == {*code.instructions} and too_much(code, STACK.get(name, 0)) == []
    if name not in STACK:
        assert (code.count("LDL"), code.count("STL")) == (0, 0)


def large_kernels(code: MachineCode) -> list[str]:
    return [name for name, usage in code.usage.items() if usage.threads == BRINGING + COMPUTING]


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_kernels_use_tensor_cores_and_the_copy_engine(name: str) -> None:
    code, expected = machine_code(SOURCES[name]), PRODUCTS[name]
    assert {found for found in TENSOR_CORES if code.count(found)} == {*expected.instructions}
    assert code.count("UTMALDG") > 0 and (code.count("UTMASTG") > 0) == expected.stores
    assert large_kernels(code)


@pytest.mark.parametrize("name", HOPPER)
def test_registers_that_are_taken_are_there(name: str) -> None:
    """A setmaxnreg that asks for more than the block began with waits for ever."""
    code = machine_code(SOURCES[name])
    for kernel in large_kernels(code):
        given_away, taken = code.register_changes(kernel)
        wanted = BRINGING * given_away + COMPUTING * taken
        assert wanted <= code.usage[kernel].registers * (BRINGING + COMPUTING), kernel


@pytest.mark.parametrize("name", HOPPER)
def test_exponentials_run_while_products_do(name: str) -> None:
    code, expected = machine_code(SOURCES[name]), PRODUCTS[name]
    for kernel in large_kernels(code):
        found = code.exponentials(kernel)
        assert found.under_way >= expected.under_way, (kernel, found)
        assert expected.alone is None or found.alone <= expected.alone, (kernel, found)


def test_the_table_names_the_ops_for_hopper() -> None:
    assert {*PRODUCTS} == {*HOPPER}


# The checks must see what they look for.

LOCAL = """
__global__ void __launch_bounds__(64) local_kernel(int* numbers, int count) {
  int table[64];
  for (int i = 0; i < 64; ++i) table[i] = numbers[i];
  for (int i = 0; i < count; ++i) table[numbers[i] & 63] += i;
  numbers[threadIdx.x] = table[numbers[threadIdx.x] & 63];
}
"""
UNFENCED = """
#include "kernels/common/hopper.h"
__global__ void unfenced_kernel(float* out, unsigned long long a, unsigned long long b) {
  u4d::hopper::registers_decrease<24>();
  float d[88];
  for (int i = 0; i < 88; ++i) d[i] = out[i];
  u4d::hopper::wgmma_shared<176>(d, a, b, 1);
  for (int i = 0; i < 88; ++i) out[i] = d[i];
}
"""


def test_local_memory_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "local_memory_example.cu"
    source.write_text(LOCAL)
    code = machine_code(source)
    assert code.count("LDL") > 0 and code.count("STL") > 0 and "bytes of stack" in too_much(code)[0]
    (usage,) = code.usage.values()
    assert usage.threads == 64 and usage.registers > 0


def test_what_the_assembler_tells_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "unfenced_example.cu"
    source.write_text(UNFENCED)
    told = "\n".join(complaints(compile_source(source)[1]))
    assert "setmaxnreg" in told and "warpgroup" in told


WAITED_FOR = """
#include "kernels/common/hopper.h"
__global__ void __launch_bounds__(128, 1) waited_kernel(float* out, unsigned long long a, unsigned long long b) {
  float c[32], d[32];
  u4d::hopper::wgmma_fence();
  u4d::hopper::wgmma_shared<64>(c, a, b, 0);
  u4d::hopper::wgmma_commit();
  u4d::hopper::wgmma_shared<64>(d, b, a, 0);
  u4d::hopper::wgmma_commit();
  u4d::hopper::wgmma_wait<LEFT>();
  u4d::hopper::hold_registers(c);
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += u4d::hopper::exp2_approx(c[i]);
  u4d::hopper::order_after(sum);
  u4d::hopper::wgmma_wait<0>();
  u4d::hopper::hold_registers(d);
  for (int i = 0; i < 32; ++i) out[i] = d[i] + sum;
}
"""


@pytest.mark.parametrize("left", [0, 1])
def test_exponentials_after_a_wait_are_seen(left: int, tmp_path: Path) -> None:
    source = tmp_path / f"waited_for_example_{left}.cu"
    source.write_text(WAITED_FOR.replace("LEFT", str(left)))
    code = machine_code(source)
    (kernel,) = code.instructions
    assert code.exponentials(kernel) == (Exponentials(32, 0) if left else Exponentials(0, 32))
