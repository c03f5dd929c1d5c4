#include "kernels/ada_layer_norm_fp8/ada_layer_norm_fp8.h"

#include "kernels/gated_residual_norm/frame_rows.cuh"

namespace u4d {

Status ada_layer_norm_fp8_cuda(void* stream, const void* x, const float* shift, const float* scale, E4m3* values,
                               float* row_scale, std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                               std::int64_t frames, std::int64_t patches, std::int64_t width, std::int64_t shift_stream,
                               std::int64_t shift_clip, std::int64_t shift_frame, std::int64_t scale_stream,
                               std::int64_t scale_clip, std::int64_t scale_frame, double eps) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    frame_rows::Arguments<T, E4m3> a{};
    a.x = static_cast<const T*>(x);
    a.shift = {shift, shift_stream, shift_clip, shift_frame};
    a.scale = {scale, scale_stream, scale_clip, scale_frame};
    a.normed = values;
    a.norm_scale = row_scale;
    a.sizes = {streams, batch, frames, patches, width};
    a.eps = static_cast<float>(eps);
    return frame_rows::launch_rows<false, true>(stream, a);
  });
}

}  // namespace u4d
