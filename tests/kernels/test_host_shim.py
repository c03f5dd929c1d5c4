"""The host shim must run correct kernels and show missing barriers: else the tests that use it prove nothing."""

from __future__ import annotations

import ctypes
from pathlib import Path

from shim_compiler import compile_for_cpu

REVERSE = """
#include "kernels/common/launch.h"

namespace u4d {
namespace {
// Reverses each block's 64 numbers, then adds up each warp's.
__global__ void reverse_kernel(const float* from, float* to, float* sums) {
  __shared__ float held[64];
  held[threadIdx.x] = from[blockIdx.x * 64 + threadIdx.x];
  BARRIER
  const float value = held[63 - threadIdx.x];
  to[blockIdx.x * 64 + threadIdx.x] = value;
  float total = value;
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
  if (threadIdx.x % 32 == 0) sums[blockIdx.x * 2 + threadIdx.x / 32] = total;
}
}  // namespace

U4D_KERNEL Status reverse_cuda(void* stream, const float* from, float* to, float* sums, std::int64_t blocks) {
  U4D_LAUNCH(reverse_kernel, static_cast<unsigned int>(blocks), 64, 0, stream, from, to, sums);
  return launch_status();
}
}  // namespace u4d
"""


def run(folder: Path, barrier: str) -> list[tuple[list[float], list[float]]]:
    """Results in both thread orders."""
    source = folder / "reverse.cu"
    source.write_text(REVERSE.replace("BARRIER", barrier))
    loaded = compile_for_cpu([source], folder / "reverse.so")
    results = []
    for last_first in (0, 1):
        loaded.u4d_shim_last_thread_first(last_first)
        given, to, sums = (ctypes.c_float * 128)(*range(128)), (ctypes.c_float * 128)(), (ctypes.c_float * 4)()
        assert loaded.reverse_cuda(None, given, to, sums, ctypes.c_int64(2)) == 0
        results.append((list(to), list(sums)))
    return results


def test_a_right_kernel_gives_its_result_in_both_orders(tmp_path: Path) -> None:
    expected = [*range(63, -1, -1), *range(127, 63, -1)]
    sums = [sum(expected[first : first + 32]) for first in range(0, 128, 32)]
    assert run(tmp_path, "__syncthreads();") == [(expected, sums), (expected, sums)]


def test_a_missing_barrier_shows(tmp_path: Path) -> None:
    forward, reverse = run(tmp_path, "")
    assert forward != reverse
