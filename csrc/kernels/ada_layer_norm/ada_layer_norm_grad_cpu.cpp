#include "kernels/ada_layer_norm/ada_layer_norm.h"
#include "kernels/common/vectorise.h"
#include "kernels/gated_residual_norm/frame_rows_grad_cpu.h"

namespace u4d {
namespace {

template <class T>
U4D_INLINE void row_grad(const T* grad, const T* x, const float* scale, T* grad_x, float* shift_sums, float* scale_sums,
                         std::int64_t width, float eps) {
  const NormStatistics row = norm_statistics(grad, x, scale, width, eps);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) {
    round_to(norm_column_grad(to_float(grad[i]), to_float(x[i]), scale[i], row, shift_sums[i], scale_sums[i]),
             grad_x[i]);
  }
}

// GCC clones no templates.
#define U4D_ROW_OF_GRADS(T)                                                                                 \
  U4D_CLONES void row_of_grads(const T* grad, const T* x, const float* scale, T* grad_x, float* shift_sums, \
                               float* scale_sums, std::int64_t width, float eps) {                          \
    row_grad(grad, x, scale, grad_x, shift_sums, scale_sums, width, eps);                                   \
  }
U4D_ROW_OF_GRADS(float)
U4D_ROW_OF_GRADS(Bfloat16)
U4D_ROW_OF_GRADS(Float16)
#undef U4D_ROW_OF_GRADS

}  // namespace

Status ada_layer_norm_grad_cpu(int num_threads, const void* grad, const void* x, const float* scale, void* grad_x,
                               float* partials, std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                               std::int64_t frames, std::int64_t patches, std::int64_t width, std::int64_t scale_stream,
                               std::int64_t scale_clip, std::int64_t scale_frame, std::int64_t rows_per_part,
                               double eps) {
  const RowSizes sizes{streams, batch, frames, patches, width};
  const Status status = check_parts(sizes, rows_per_part);
  if (status != kOk) return status;
  const FrameTable scales{scale, scale_stream, scale_clip, scale_frame};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* slopes = static_cast<const T*>(grad);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(grad_x);
    for_parts_of_frames<2>(num_threads, sizes, rows_per_part, partials,
                           [=](std::int64_t row, const FramePlace& place, float* sums, std::int64_t stride) {
                             const std::int64_t at = row * width;
                             row_of_grads(slopes + at, from + at, row_of(scales, place), to + at, sums, sums + stride,
                                          width, static_cast<float>(eps));
                           });
    return kOk;
  });
}

}  // namespace u4d
