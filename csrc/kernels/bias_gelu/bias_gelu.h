// gelu(x + bias) with the tanh form of GELU. Specification: u4d_fast/reference/bias_gelu.py.
//
// Arguments of both launchers:
//   x     [streams, rows, width], contiguous, of the type `dtype` (common/half_types.h)
//   bias  [streams, width], contiguous, of the type `bias_dtype`: float32 or x's
//   out   like x, every element is written; may be x itself
//   No alignment is asked for; 16 bytes throughout are fastest.
//
// Arithmetic is float32 with one rounding: 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)), so gelu is v / (1 + exp(-2u)), which
// loses no digits where v is negative. NaN stays NaN. Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/half_types.h"
#include "kernels/common/host_device.h"
#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status bias_gelu_cpu(int num_threads, const void* x, const void* bias, void* out, std::int64_t dtype,
                                std::int64_t bias_dtype, std::int64_t streams, std::int64_t rows, std::int64_t width);

U4D_KERNEL Status bias_gelu_cuda(void* stream, const void* x, const void* bias, void* out, std::int64_t dtype,
                                 std::int64_t bias_dtype, std::int64_t streams, std::int64_t rows, std::int64_t width);

// The backward pass.
//   grad, x, grad_x  like x above; grad_x is written, and no other argument's memory
//   bias      [streams, width] float32, contiguous
//   partials  [parts, streams, width] float32, contiguous, with parts = ceil(rows / rows_per_part): for each part of a
//             stream's rows the gradient of bias, to be added up over the parts
U4D_KERNEL Status bias_gelu_grad_cpu(int num_threads, const void* grad, const void* x, const float* bias, void* grad_x,
                                     float* partials, std::int64_t dtype, std::int64_t streams, std::int64_t rows,
                                     std::int64_t width, std::int64_t rows_per_part);

U4D_KERNEL Status bias_gelu_grad_cuda(void* stream, const void* grad, const void* x, const float* bias, void* grad_x,
                                      float* partials, std::int64_t dtype, std::int64_t streams, std::int64_t rows,
                                      std::int64_t width, std::int64_t rows_per_part);

// The exponent -2u of GELU's v / (1 + exp(-2u)).
U4D_HD float gelu_exponent(float v) {
  constexpr float kFactor = -1.5957691216057308f, kCube = 0.044715f;  // -2 sqrt(2 / pi)
  return kFactor * (v + kCube * (v * v * v));
}

}  // namespace u4d
