// x + update * gate with a gate per latent frame. Specification: u4d_fast/reference/gated_residual.py.
//
// Arguments of both launchers:
//   x, update  [streams, batch, frames * patches, width], contiguous, of the type `dtype` (common/half_types.h)
//   gate       [streams, batch, frames, width] float32, strides of the first three dimensions in elements, the last
//              dense; never expanded per token
//   out        like x, every element is written; may be x or update itself
//   width from 1 to kMaxWidth; at most 2^31 - 1 rows; no alignment is asked for, 16 bytes throughout are fastest
//
// Arithmetic is float32 with one rounding. Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status gated_residual_cpu(int num_threads, const void* x, const void* update, const float* gate, void* out,
                                     std::int64_t dtype, std::int64_t streams, std::int64_t batch, std::int64_t frames,
                                     std::int64_t patches, std::int64_t width, std::int64_t gate_stream,
                                     std::int64_t gate_clip, std::int64_t gate_frame);

U4D_KERNEL Status gated_residual_cuda(void* stream, const void* x, const void* update, const float* gate, void* out,
                                      std::int64_t dtype, std::int64_t streams, std::int64_t batch, std::int64_t frames,
                                      std::int64_t patches, std::int64_t width, std::int64_t gate_stream,
                                      std::int64_t gate_clip, std::int64_t gate_frame);

// The backward pass; the gradient of x is that of the result.
//   grad, update, grad_update  like x; grad_update is written, and no other argument's memory
//   partials  [parts, streams, batch, frames, width] float32, contiguous, with parts = ceil(patches / rows_per_part):
//             for each part of a frame's rows the gradient of gate, to be added up over the parts. Nothing is written
//             where there are no rows.
U4D_KERNEL Status gated_residual_grad_cpu(int num_threads, const void* grad, const void* update, const float* gate,
                                          void* grad_update, float* partials, std::int64_t dtype, std::int64_t streams,
                                          std::int64_t batch, std::int64_t frames, std::int64_t patches,
                                          std::int64_t width, std::int64_t gate_stream, std::int64_t gate_clip,
                                          std::int64_t gate_frame, std::int64_t rows_per_part);

U4D_KERNEL Status gated_residual_grad_cuda(void* stream, const void* grad, const void* update, const float* gate,
                                           void* grad_update, float* partials, std::int64_t dtype, std::int64_t streams,
                                           std::int64_t batch, std::int64_t frames, std::int64_t patches,
                                           std::int64_t width, std::int64_t gate_stream, std::int64_t gate_clip,
                                           std::int64_t gate_frame, std::int64_t rows_per_part);

}  // namespace u4d
