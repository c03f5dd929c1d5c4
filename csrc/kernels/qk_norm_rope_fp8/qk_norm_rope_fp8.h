// qk_norm_rope as e4m3 with a scale per token and head. Specification: u4d_fast/reference/qk_norm_rope_fp8.py.
//
// Arguments of both launchers:
//   x, weight, cos, sin  those of qk_norm_rope (kernels/qk_norm_rope/)
//   values  [batch, streams * tokens, heads, head_dim], contiguous, and
//   scale   [batch, streams * tokens, heads] float32, as quantize_rows writes them (kernels/quantize_rows/)
//
// Any alignment is right; the CUDA kernel is fast where rows begin at multiples of 16 bytes and a head is 1, 2, 4, ...
// or 32 times 16 bytes of x. Arithmetic is float32, and its result is quantised as it is, without a rounding between.
// The same input gives the same bits. Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/e4m3.h"
#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status qk_norm_rope_fp8_cpu(int num_threads, const void* x, const void* weight, const float* cos,
                                       const float* sin, E4m3* values, float* scale, std::int64_t dtype,
                                       std::int64_t weight_dtype, std::int64_t streams, std::int64_t batch,
                                       std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
                                       std::int64_t stream_stride, std::int64_t batch_stride, std::int64_t token_stride,
                                       double eps);

U4D_KERNEL Status qk_norm_rope_fp8_cuda(void* stream, const void* x, const void* weight, const float* cos,
                                        const float* sin, E4m3* values, float* scale, std::int64_t dtype,
                                        std::int64_t weight_dtype, std::int64_t streams, std::int64_t batch,
                                        std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
                                        std::int64_t stream_stride, std::int64_t batch_stride,
                                        std::int64_t token_stride, double eps);

}  // namespace u4d
