#include "kernels/common/vectorise.h"
#include "kernels/gated_residual_norm/frame_rows_grad_cpu.h"
#include "kernels/gated_residual_norm/gated_residual_norm.h"

namespace u4d {
namespace {

template <class T>
struct Row {
  const T *grad_x_new, *grad_normed, *x_new, *update;
  const float *gate, *scale;
  T *grad_x, *grad_update;
  float *gate_sums, *shift_sums, *scale_sums;
};

template <class T>
U4D_INLINE void row_grad(const Row<T>& a, std::int64_t width, float eps) {
  const T *grad_x_new = a.grad_x_new, *grad_normed = a.grad_normed, *x_new = a.x_new, *update = a.update;
  const float *gate = a.gate, *scale = a.scale;
  T *grad_x = a.grad_x, *grad_update = a.grad_update;
  float *gate_sums = a.gate_sums, *shift_sums = a.shift_sums, *scale_sums = a.scale_sums;
  const NormStatistics row = norm_statistics(grad_normed, x_new, scale, width, eps);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) {
    const float through_norm =
        norm_column_grad(to_float(grad_normed[i]), to_float(x_new[i]), scale[i], row, shift_sums[i], scale_sums[i]);
    const float slope = to_float(grad_x_new[i]) + through_norm;
    gate_sums[i] += slope * to_float(update[i]);
    round_to(slope * gate[i], grad_update[i]);
    round_to(slope, grad_x[i]);
  }
}

// GCC clones no templates.
#define U4D_ROW_OF_GRADS(T) \
  U4D_CLONES void row_of_grads(const Row<T>& row, std::int64_t width, float eps) { row_grad(row, width, eps); }
U4D_ROW_OF_GRADS(float)
U4D_ROW_OF_GRADS(Bfloat16)
U4D_ROW_OF_GRADS(Float16)
#undef U4D_ROW_OF_GRADS

template <class T>
constexpr T kZeros[kMaxWidth] = {};  // a row of the gradient that is not there

}  // namespace

Status gated_residual_norm_grad_cpu(int num_threads, const void* grad_x_new, const void* grad_normed, const void* x_new,
                                    const void* update, const float* gate, const float* scale, void* grad_x,
                                    void* grad_update, float* partials, std::int64_t dtype, std::int64_t streams,
                                    std::int64_t batch, std::int64_t frames, std::int64_t patches, std::int64_t width,
                                    std::int64_t gate_stream, std::int64_t gate_clip, std::int64_t gate_frame,
                                    std::int64_t scale_stream, std::int64_t scale_clip, std::int64_t scale_frame,
                                    std::int64_t rows_per_part, double eps) {
  const RowSizes sizes{streams, batch, frames, patches, width};
  const Status status = check_parts(sizes, rows_per_part);
  if (status != kOk) return status;
  const FrameTable gates{gate, gate_stream, gate_clip, gate_frame};
  const FrameTable scales{scale, scale_stream, scale_clip, scale_frame};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* direct = static_cast<const T*>(grad_x_new);
    const T* slopes = static_cast<const T*>(grad_normed);
    const T* rows = static_cast<const T*>(x_new);
    const T* updates = static_cast<const T*>(update);
    T* to = static_cast<T*>(grad_x);
    T* to_update = static_cast<T*>(grad_update);
    for_parts_of_frames<3>(num_threads, sizes, rows_per_part, partials,
                           [=](std::int64_t row, const FramePlace& place, float* sums, std::int64_t stride) {
                             const std::int64_t at = row * width;
                             const Row<T> given{direct == nullptr ? kZeros<T> : direct + at,
                                                slopes + at,
                                                rows + at,
                                                updates + at,
                                                row_of(gates, place),
                                                row_of(scales, place),
                                                to + at,
                                                to_update + at,
                                                sums,
                                                sums + stride,
                                                sums + 2 * stride};
                             row_of_grads(given, width, static_cast<float>(eps));
                           });
    return kOk;
  });
}

}  // namespace u4d
