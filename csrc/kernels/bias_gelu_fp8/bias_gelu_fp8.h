// gelu(x + bias) with the tanh form of GELU, as e4m3 with a scale per row. Specification:
// u4d_fast/reference/bias_gelu_fp8.py.
//
// Arguments of both launchers:
//   x       [streams, rows, width], contiguous, of the type `dtype` (common/half_types.h)
//   bias    [streams, width], contiguous, of the type `bias_dtype`: float32 or x's
//   values  like x, and scale [streams, rows] float32, as quantize_rows writes them (kernels/quantize_rows/)
//   width from 1 to kMostQuantized; at most 2^31 - 1 rows in all; no alignment is asked for, 16 bytes are fastest
//
// Arithmetic is float32, that of bias_gelu, and the result is quantised as it is, without a rounding between. Nothing
// is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/e4m3.h"
#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status bias_gelu_fp8_cpu(int num_threads, const void* x, const void* bias, E4m3* values, float* scale,
                                    std::int64_t dtype, std::int64_t bias_dtype, std::int64_t streams,
                                    std::int64_t rows, std::int64_t width);

U4D_KERNEL Status bias_gelu_fp8_cuda(void* stream, const void* x, const void* bias, E4m3* values, float* scale,
                                     std::int64_t dtype, std::int64_t bias_dtype, std::int64_t streams,
                                     std::int64_t rows, std::int64_t width);

}  // namespace u4d
