#include "kernels/gated_residual_norm/gated_residual_norm.h"

#include "kernels/gated_residual_norm/frame_rows_grad.cuh"

namespace u4d {

Status gated_residual_norm_grad_cuda(void* stream, const void* grad_x_new, const void* grad_normed, const void* x_new,
                                     const void* update, const float* gate, const float* scale, void* grad_x,
                                     void* grad_update, float* partials, std::int64_t dtype, std::int64_t streams,
                                     std::int64_t batch, std::int64_t frames, std::int64_t patches, std::int64_t width,
                                     std::int64_t gate_stream, std::int64_t gate_clip, std::int64_t gate_frame,
                                     std::int64_t scale_stream, std::int64_t scale_clip, std::int64_t scale_frame,
                                     std::int64_t rows_per_part, double eps) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    frame_rows::GradArguments<T> a{};
    a.grad_x_new = static_cast<const T*>(grad_x_new);
    a.grad_normed = static_cast<const T*>(grad_normed);
    a.x_new = static_cast<const T*>(x_new);
    a.update = static_cast<const T*>(update);
    a.gate = {gate, gate_stream, gate_clip, gate_frame};
    a.scale = {scale, scale_stream, scale_clip, scale_frame};
    a.grad_x = static_cast<T*>(grad_x);
    a.grad_update = static_cast<T*>(grad_update);
    a.partials = partials;
    a.sizes = {streams, batch, frames, patches, width};
    a.eps = static_cast<float>(eps);
    return frame_rows::launch_rows_grad<true, true>(stream, a, rows_per_part);
  });
}

}  // namespace u4d
