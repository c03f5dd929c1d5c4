// RMS norm of projected tokens over the full width, rotary positions, and the layout that attention takes.
// Specification: u4d_fast/reference/qk_norm_rope.py.
//
// Arguments of both launchers:
//   x         [streams, batch, tokens, heads * head_dim] of type `dtype` (kFloat32, kBfloat16, kFloat16); channels are
//             dense, the other strides are given, in elements; head_dim is even
//   weight    [streams, heads * head_dim] contiguous, of type `weight_dtype`: `dtype` or kFloat32
//   cos, sin  [tokens, head_dim / 2] contiguous, float32; a pair is two neighbouring channels
//   out       [batch, streams * tokens, heads, head_dim] contiguous, of type `dtype`; every element is written
//   eps       is added to the mean square
//
// Any alignment is right; the CUDA kernel is fast where rows and heads begin at multiples of 16 bytes. Arithmetic is
// float32, with one rounding at the end. Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status qk_norm_rope_cpu(int num_threads, const void* x, const void* weight, const float* cos,
                                   const float* sin, void* out, std::int64_t dtype, std::int64_t weight_dtype,
                                   std::int64_t streams, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                                   std::int64_t head_dim, std::int64_t stream_stride, std::int64_t batch_stride,
                                   std::int64_t token_stride, double eps);

U4D_KERNEL Status qk_norm_rope_cuda(void* stream, const void* x, const void* weight, const float* cos, const float* sin,
                                    void* out, std::int64_t dtype, std::int64_t weight_dtype, std::int64_t streams,
                                    std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
                                    std::int64_t stream_stride, std::int64_t batch_stride, std::int64_t token_stride,
                                    double eps);

// Gradients. Besides the arguments above:
//   grad     [batch, streams * tokens, heads, head_dim] contiguous, of type `dtype`: the gradient of `out`
//   weight   float32
//   grad_x   [streams, batch, tokens, heads * head_dim] contiguous, of type `dtype`, out
//   partial  [chunks, streams, heads * head_dim] float32, out: the weight's gradient, summed over the rows of each
//   chunk
// There is at least one row and one channel. The CUDA kernel takes nothing but 16-byte vectors: every row and every
// head begins at a multiple of 16 bytes, and a row is at most 16 KB long; else the status is kInvalidArgument.
U4D_KERNEL Status qk_norm_rope_grad_cpu(int num_threads, const void* grad, const void* x, const float* weight,
                                        const float* cos, const float* sin, void* grad_x, float* partial,
                                        std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                                        std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
                                        std::int64_t stream_stride, std::int64_t batch_stride,
                                        std::int64_t token_stride, std::int64_t chunks, double eps);

U4D_KERNEL Status qk_norm_rope_grad_cuda(void* stream, const void* grad, const void* x, const float* weight,
                                         const float* cos, const float* sin, void* grad_x, float* partial,
                                         std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                                         std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
                                         std::int64_t stream_stride, std::int64_t batch_stride,
                                         std::int64_t token_stride, std::int64_t chunks, double eps);

}  // namespace u4d
