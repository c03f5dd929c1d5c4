// A gated residual update and the adaptive layer norm of its result, in one pass. Specification:
// u4d_fast/reference/gated_residual_norm.py.
//
// Arguments of both launchers:
//   x, update  [streams, batch, frames * patches, width], contiguous, of the type `dtype` (common/half_types.h)
//   gate, shift, scale  [streams, batch, frames, width] float32, strides of the first three dimensions in elements, the
//              last dense; never expanded per token
//   x_new      like x: x + update * gate, rounded; may be x or update itself
//   normed     like x: ada_layer_norm of x_new as it was rounded; no other argument's memory
//   width from 1 to kMaxWidth; at most 2^31 - 1 rows; no alignment is asked for, 16 bytes throughout are fastest
//
// Arithmetic is float32. The same input gives the same bits, and the bits of gated_residual followed by ada_layer_norm.
// Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status gated_residual_norm_cpu(int num_threads, const void* x, const void* update, const float* gate,
                                          const float* shift, const float* scale, void* x_new, void* normed,
                                          std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                                          std::int64_t frames, std::int64_t patches, std::int64_t width,
                                          std::int64_t gate_stream, std::int64_t gate_clip, std::int64_t gate_frame,
                                          std::int64_t shift_stream, std::int64_t shift_clip, std::int64_t shift_frame,
                                          std::int64_t scale_stream, std::int64_t scale_clip, std::int64_t scale_frame,
                                          double eps);

U4D_KERNEL Status gated_residual_norm_cuda(void* stream, const void* x, const void* update, const float* gate,
                                           const float* shift, const float* scale, void* x_new, void* normed,
                                           std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                                           std::int64_t frames, std::int64_t patches, std::int64_t width,
                                           std::int64_t gate_stream, std::int64_t gate_clip, std::int64_t gate_frame,
                                           std::int64_t shift_stream, std::int64_t shift_clip, std::int64_t shift_frame,
                                           std::int64_t scale_stream, std::int64_t scale_clip, std::int64_t scale_frame,
                                           double eps);

// The backward pass.
//   grad_x_new, grad_normed  like x: the gradients of both results; grad_x_new may be null, which stands for zeros
//   x_new      the forward pass' result
//   grad_x, grad_update  like x; written, and no other argument's memory
//   partials   [parts, 3, streams, batch, frames, width] float32, contiguous, with parts = ceil(patches /
//              rows_per_part): for each part of a frame's rows the gradients of gate, shift and scale, to be added up
//              over the parts. Nothing is written where there are no rows.
U4D_KERNEL Status gated_residual_norm_grad_cpu(
    int num_threads, const void* grad_x_new, const void* grad_normed, const void* x_new, const void* update,
    const float* gate, const float* scale, void* grad_x, void* grad_update, float* partials, std::int64_t dtype,
    std::int64_t streams, std::int64_t batch, std::int64_t frames, std::int64_t patches, std::int64_t width,
    std::int64_t gate_stream, std::int64_t gate_clip, std::int64_t gate_frame, std::int64_t scale_stream,
    std::int64_t scale_clip, std::int64_t scale_frame, std::int64_t rows_per_part, double eps);

U4D_KERNEL Status gated_residual_norm_grad_cuda(
    void* stream, const void* grad_x_new, const void* grad_normed, const void* x_new, const void* update,
    const float* gate, const float* scale, void* grad_x, void* grad_update, float* partials, std::int64_t dtype,
    std::int64_t streams, std::int64_t batch, std::int64_t frames, std::int64_t patches, std::int64_t width,
    std::int64_t gate_stream, std::int64_t gate_clip, std::int64_t gate_frame, std::int64_t scale_stream,
    std::int64_t scale_clip, std::int64_t scale_frame, std::int64_t rows_per_part, double eps);

}  // namespace u4d
