#include "kernels/gated_residual_norm_fp8/gated_residual_norm_fp8.h"

#include "kernels/gated_residual_norm/frame_rows.cuh"

namespace u4d {

Status gated_residual_norm_fp8_cuda(void* stream, const void* x, const void* update, const float* gate,
                                    const float* shift, const float* scale, void* x_new, E4m3* values, float* row_scale,
                                    std::int64_t dtype, std::int64_t streams, std::int64_t batch, std::int64_t frames,
                                    std::int64_t patches, std::int64_t width, std::int64_t gate_stream,
                                    std::int64_t gate_clip, std::int64_t gate_frame, std::int64_t shift_stream,
                                    std::int64_t shift_clip, std::int64_t shift_frame, std::int64_t scale_stream,
                                    std::int64_t scale_clip, std::int64_t scale_frame, double eps) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    frame_rows::Arguments<T, E4m3> a{};
    a.x = static_cast<const T*>(x);
    a.update = static_cast<const T*>(update);
    a.gate = {gate, gate_stream, gate_clip, gate_frame};
    a.shift = {shift, shift_stream, shift_clip, shift_frame};
    a.scale = {scale, scale_stream, scale_clip, scale_frame};
    a.x_new = static_cast<T*>(x_new);
    a.normed = values;
    a.norm_scale = row_scale;
    a.sizes = {streams, batch, frames, patches, width};
    a.eps = static_cast<float>(eps);
    return frame_rows::launch_rows<true, true>(stream, a);
  });
}

}  // namespace u4d
