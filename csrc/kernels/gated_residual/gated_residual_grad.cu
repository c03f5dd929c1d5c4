#include "kernels/gated_residual/gated_residual.h"

#include "kernels/gated_residual_norm/frame_rows_grad.cuh"

namespace u4d {

Status gated_residual_grad_cuda(void* stream, const void* grad, const void* update, const float* gate,
                                void* grad_update, float* partials, std::int64_t dtype, std::int64_t streams,
                                std::int64_t batch, std::int64_t frames, std::int64_t patches, std::int64_t width,
                                std::int64_t gate_stream, std::int64_t gate_clip, std::int64_t gate_frame,
                                std::int64_t rows_per_part) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    frame_rows::GradArguments<T> a{};
    a.grad_x_new = static_cast<const T*>(grad);
    a.update = static_cast<const T*>(update);
    a.gate = {gate, gate_stream, gate_clip, gate_frame};
    a.grad_update = static_cast<T*>(grad_update);
    a.partials = partials;
    a.sizes = {streams, batch, frames, patches, width};
    return frame_rows::launch_rows_grad<true, false>(stream, a, rows_per_part);
  });
}

}  // namespace u4d
