// ada_layer_norm as e4m3 with a scale per row. Specification: u4d_fast/reference/ada_layer_norm_fp8.py.
//
// Arguments of both launchers:
//   x, shift, scale  those of ada_layer_norm (kernels/ada_layer_norm/)
//   values           [streams, batch, frames * patches, width], contiguous, and
//   row_scale        [streams, batch, frames * patches] float32, as quantize_rows writes them (kernels/quantize_rows/)
//
// Arithmetic is float32, and the norm is quantised as it is, without a rounding between. The same input gives the same
// bits. Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/e4m3.h"
#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status ada_layer_norm_fp8_cpu(int num_threads, const void* x, const float* shift, const float* scale,
                                         E4m3* values, float* row_scale, std::int64_t dtype, std::int64_t streams,
                                         std::int64_t batch, std::int64_t frames, std::int64_t patches,
                                         std::int64_t width, std::int64_t shift_stream, std::int64_t shift_clip,
                                         std::int64_t shift_frame, std::int64_t scale_stream, std::int64_t scale_clip,
                                         std::int64_t scale_frame, double eps);

U4D_KERNEL Status ada_layer_norm_fp8_cuda(void* stream, const void* x, const float* shift, const float* scale,
                                          E4m3* values, float* row_scale, std::int64_t dtype, std::int64_t streams,
                                          std::int64_t batch, std::int64_t frames, std::int64_t patches,
                                          std::int64_t width, std::int64_t shift_stream, std::int64_t shift_clip,
                                          std::int64_t shift_frame, std::int64_t scale_stream, std::int64_t scale_clip,
                                          std::int64_t scale_frame, double eps);

}  // namespace u4d
