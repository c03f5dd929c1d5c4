// Layer norm of each row, then a scale and a shift per latent frame. Specification:
// u4d_fast/reference/ada_layer_norm.py.
//
// Arguments of both launchers:
//   x             [streams, batch, frames * patches, width], contiguous, of the type `dtype` (common/half_types.h)
//   shift, scale  [streams, batch, frames, width] float32, strides of the first three dimensions in elements, the last
//                 dense; never expanded per token
//   out           like x, every element is written; may be x itself
//   width from 1 to kMaxWidth; at most 2^31 - 1 rows; no alignment is asked for, 16 bytes throughout are fastest
//
// Arithmetic is float32: mean, then the mean square of what is left, then one rounding. The same input gives the same
// bits. Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status ada_layer_norm_cpu(int num_threads, const void* x, const float* shift, const float* scale, void* out,
                                     std::int64_t dtype, std::int64_t streams, std::int64_t batch, std::int64_t frames,
                                     std::int64_t patches, std::int64_t width, std::int64_t shift_stream,
                                     std::int64_t shift_clip, std::int64_t shift_frame, std::int64_t scale_stream,
                                     std::int64_t scale_clip, std::int64_t scale_frame, double eps);

U4D_KERNEL Status ada_layer_norm_cuda(void* stream, const void* x, const float* shift, const float* scale, void* out,
                                      std::int64_t dtype, std::int64_t streams, std::int64_t batch, std::int64_t frames,
                                      std::int64_t patches, std::int64_t width, std::int64_t shift_stream,
                                      std::int64_t shift_clip, std::int64_t shift_frame, std::int64_t scale_stream,
                                      std::int64_t scale_clip, std::int64_t scale_frame, double eps);

// The backward pass.
//   grad, grad_x  like x; grad_x is written, and no other argument's memory
//   partials      [parts, 2, streams, batch, frames, width] float32, contiguous, with parts = ceil(patches /
//                 rows_per_part): for each part of a frame's rows the gradients of shift and of scale, to be added up
//                 over the parts. Nothing is written where there are no rows.
U4D_KERNEL Status ada_layer_norm_grad_cpu(int num_threads, const void* grad, const void* x, const float* scale,
                                          void* grad_x, float* partials, std::int64_t dtype, std::int64_t streams,
                                          std::int64_t batch, std::int64_t frames, std::int64_t patches,
                                          std::int64_t width, std::int64_t scale_stream, std::int64_t scale_clip,
                                          std::int64_t scale_frame, std::int64_t rows_per_part, double eps);

U4D_KERNEL Status ada_layer_norm_grad_cuda(void* stream, const void* grad, const void* x, const float* scale,
                                           void* grad_x, float* partials, std::int64_t dtype, std::int64_t streams,
                                           std::int64_t batch, std::int64_t frames, std::int64_t patches,
                                           std::int64_t width, std::int64_t scale_stream, std::int64_t scale_clip,
                                           std::int64_t scale_frame, std::int64_t rows_per_part, double eps);

}  // namespace u4d
