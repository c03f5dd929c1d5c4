"""What nvcc makes of the CUDA sources for sm_90a: no spills, no products in single file, tensor cores really used."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_code import MachineCode, compile_source, machine_code
from shim_compiler import KERNELS, with_includes

SOURCES = {path.stem: path for path in sorted(KERNELS.glob("*/*.cu"))}
REGISTERS, SHARED = 65536, 227 * 1024  # of a multiprocessor; of a block

# Bytes of local memory that a thread may take, where it is not 0: small matrices that are indexed at run time.
STACK = {"rays_to_cameras": 1312}


HOPPER = [name for name, path in SOURCES.items() if KERNELS / "common" / "hopper.h" in with_includes([path])]


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


@pytest.mark.parametrize("name", HOPPER)
def test_hopper_kernels_use_tensor_cores_and_the_copy_engine(name: str) -> None:
    code = machine_code(SOURCES[name])
    counts = {mnemonic: code.count(mnemonic) for mnemonic in ("HGMMA", "UTMALDG", "USETMAXREG", "HMMA")}
    assert counts["HGMMA"] > 0 and counts["UTMALDG"] > 0 and counts["USETMAXREG"] > 0 and counts["HMMA"] == 0
    specialised = [usage for usage in code.usage.values() if usage.threads == 384]
    assert specialised and all(usage.registers <= 168 for usage in specialised)


def test_attention_is_such_a_kernel() -> None:
    assert "multi_stream_attention" in HOPPER


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
