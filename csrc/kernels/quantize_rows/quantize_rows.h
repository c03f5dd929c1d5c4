// Rows as e4m3 with a float32 scale each. Specification: u4d_fast/reference/quantize_rows.py.
//
// Arguments of both launchers:
//   x       [rows, width], contiguous, of the type `dtype` (common/half_types.h)
//   values  [rows, width], contiguous: x / scale, rounded (common/e4m3.h); no other argument's memory
//   scale   [rows] float32: the row's largest magnitude / 448; 1 for a row of zeros, NaN for one with NaN or infinity
//   width from 1 to kMostQuantized; at most 2^31 - 1 rows; no alignment is asked for, 16 bytes throughout are fastest
//
// Every element is written. The same input gives the same bits on CPU and GPU. Nothing is allocated and nothing waited
// for.
#pragma once

#include <cstdint>

#include "kernels/common/e4m3.h"
#include "kernels/common/status.h"

namespace u4d {

// A row is kept where it was computed, by a CUDA block in registers; u4d_fast/ops/quantize_rows.py knows the number.
constexpr std::int64_t kMostQuantized = 16384;

U4D_KERNEL Status quantize_rows_cpu(int num_threads, const void* x, E4m3* values, float* scale, std::int64_t dtype,
                                    std::int64_t rows, std::int64_t width);

U4D_KERNEL Status quantize_rows_cuda(void* stream, const void* x, E4m3* values, float* scale, std::int64_t dtype,
                                     std::int64_t rows, std::int64_t width);

inline Status check_quantized(std::int64_t rows, std::int64_t width) {
  if (rows < 0 || width < 1) return kInvalidArgument;
  return width > kMostQuantized || rows > INT32_MAX ? kTooLarge : kOk;
}

}  // namespace u4d
