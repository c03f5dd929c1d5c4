#include "kernels/gated_residual/gated_residual.h"

#include "kernels/gated_residual_norm/frame_rows.cuh"

namespace u4d {

Status gated_residual_cuda(void* stream, const void* x, const void* update, const float* gate, void* out,
                           std::int64_t dtype, std::int64_t streams, std::int64_t batch, std::int64_t frames,
                           std::int64_t patches, std::int64_t width, std::int64_t gate_stream, std::int64_t gate_clip,
                           std::int64_t gate_frame) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    frame_rows::Arguments<T> a{};
    a.x = static_cast<const T*>(x);
    a.update = static_cast<const T*>(update);
    a.gate = {gate, gate_stream, gate_clip, gate_frame};
    a.x_new = static_cast<T*>(out);
    a.sizes = {streams, batch, frames, patches, width};
    return frame_rows::launch_rows<true, false>(stream, a);
  });
}

}  // namespace u4d
