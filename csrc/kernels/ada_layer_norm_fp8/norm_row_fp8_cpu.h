// The layer norm of one row as e4m3 on the CPU. An inline body for U4D_CLONES functions; arithmetic is float32.
#pragma once

#include <cstdint>

#include "kernels/gated_residual_norm/frame_rows_cpu.h"
#include "kernels/quantize_rows/quantize_row_cpu.h"

namespace u4d {

// Writes the values of norm_row's result and returns their scale.
template <class T>
U4D_INLINE float norm_row_fp8(const T* x, const float* shift, const float* scale, E4m3* values, std::int64_t width,
                              float eps) {
  float normed[kMaxWidth];
  norm_row(x, shift, scale, normed, width, eps);
  return quantize_row(normed, values, width);
}

}  // namespace u4d
