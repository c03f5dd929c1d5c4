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

}  // namespace u4d
