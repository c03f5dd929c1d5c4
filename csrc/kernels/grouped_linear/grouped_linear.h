// Linear layers of several streams, each with a weight of its own: out = x weight^T + bias, then tanh GELU if wanted.
// For Hopper (sm_90a), from bfloat16 or from e4m3. Specification: u4d_fast/reference/grouped_linear.py.
//
// Arguments of both launchers:
//   x        [streams, rows, depth], neighbouring channels side by side
//   weight   [streams, columns, depth], as nn.Linear stores it, neighbouring channels side by side
//   bias     [streams, columns], contiguous, of the type `bias_dtype` (common/half_types.h): float32 or bfloat16; null:
//            none
//   out      bfloat16 [streams, rows, columns], contiguous, aligned to 16 bytes; every element is written
//   columns  a multiple of 8
//   depth    a multiple of 8 (bfloat16) or 16 (e4m3): 16 bytes
//   strides  in elements; they and the addresses of x and weight are multiples of 16 bytes
//   gelu     0: none
// and of the e4m3 one:
//   x_scale       float32 [streams, rows], contiguous: a row stands for values * scale
//   weight_scale  float32 [streams, columns], contiguous
//
// Products are summed in float32 (e4m3: in the tensor core, which keeps about 14 bits, over 128 channels, then in
// float32), and the result is rounded once. Launchers allocate nothing and do not synchronise. The same input gives the
// same bits.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status grouped_linear_cuda(void* stream, const uint16_t* x, const uint16_t* weight, const void* bias,
                                      uint16_t* out, int64_t bias_dtype, int64_t streams, int64_t rows, int64_t columns,
                                      int64_t depth, int64_t x_stream_stride, int64_t x_row_stride,
                                      int64_t weight_stream_stride, int64_t weight_row_stride, int64_t gelu);

U4D_KERNEL Status grouped_linear_fp8_cuda(void* stream, const uint8_t* x, const float* x_scale, const uint8_t* weight,
                                          const float* weight_scale, const void* bias, uint16_t* out,
                                          int64_t bias_dtype, int64_t streams, int64_t rows, int64_t columns,
                                          int64_t depth, int64_t x_stream_stride, int64_t x_row_stride,
                                          int64_t weight_stream_stride, int64_t weight_row_stride, int64_t gelu);

}  // namespace u4d
