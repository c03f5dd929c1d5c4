#include "kernels/common/vectorise.h"
#include "kernels/gated_residual/gated_residual.h"
#include "kernels/gated_residual_norm/frame_rows_grad_cpu.h"

namespace u4d {
namespace {

// GCC clones no templates.
#define U4D_ROW_OF_GRADS(T)                                                                                    \
  U4D_CLONES void row_of_grads(const T* grad, const T* update, const float* gate, T* grad_update, float* sums, \
                               std::int64_t width) {                                                           \
    gate_row_grad(grad, update, gate, grad_update, sums, width);                                               \
  }
U4D_ROW_OF_GRADS(float)
U4D_ROW_OF_GRADS(Bfloat16)
U4D_ROW_OF_GRADS(Float16)
#undef U4D_ROW_OF_GRADS

}  // namespace

Status gated_residual_grad_cpu(int num_threads, const void* grad, const void* update, const float* gate,
                               void* grad_update, float* partials, std::int64_t dtype, std::int64_t streams,
                               std::int64_t batch, std::int64_t frames, std::int64_t patches, std::int64_t width,
                               std::int64_t gate_stream, std::int64_t gate_clip, std::int64_t gate_frame,
                               std::int64_t rows_per_part) {
  const RowSizes sizes{streams, batch, frames, patches, width};
  const Status status = check_parts(sizes, rows_per_part);
  if (status != kOk) return status;
  const FrameTable gates{gate, gate_stream, gate_clip, gate_frame};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* slopes = static_cast<const T*>(grad);
    const T* updates = static_cast<const T*>(update);
    T* to = static_cast<T*>(grad_update);
    for_parts_of_frames<1>(num_threads, sizes, rows_per_part, partials,
                           [=](std::int64_t row, const FramePlace& place, float* sums, std::int64_t) {
                             const std::int64_t at = row * width;
                             row_of_grads(slopes + at, updates + at, row_of(gates, place), to + at, sums, width);
                           });
    return kOk;
  });
}

}  // namespace u4d
