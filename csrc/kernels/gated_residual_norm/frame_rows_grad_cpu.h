// The backward passes over rows, one row at a time on the CPU. Inline bodies for U4D_CLONES functions; arithmetic is
// float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/gated_residual_norm/frame_rows_cpu.h"
#include "kernels/gated_residual_norm/frame_rows_grad.h"

namespace u4d {

// The gradient of `update` in x + update * gate, where `grad` is that of the sum; that of the gate is added to
// `gate_sums`.
template <class T>
U4D_INLINE void gate_row_grad(const T* grad, const T* update, const float* gate, T* grad_update, float* gate_sums,
                              std::int64_t width) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) {
    const float slope = to_float(grad[i]);
    gate_sums[i] += slope * to_float(update[i]);
    round_to(slope * gate[i], grad_update[i]);
  }
}

// What the gradient of a normalised row needs to know of the whole row: y = (x - mean) * inverse, the mean of y's
// gradient and that of its product with y.
struct NormStatistics {
  float mean, inverse, grad_mean, along;
};

// Here `grad` is the gradient of y * (1 + scale) + shift.
template <class T>
U4D_INLINE NormStatistics norm_statistics(const T* grad, const T* x, const float* scale, std::int64_t width,
                                          float eps) {
  const float columns = static_cast<float>(width);
  const float mean = sum_of_columns(width, [=](std::int64_t i) U4D_INLINE_LAMBDA { return to_float(x[i]); }) / columns;
  const float squares = sum_of_columns(width, [=](std::int64_t i) U4D_INLINE_LAMBDA {
    const float centred = to_float(x[i]) - mean;
    return centred * centred;
  });
  const float inverse = 1.0f / std::sqrt(squares / columns + eps);
  const float grad_sum =
      sum_of_columns(width, [=](std::int64_t i) U4D_INLINE_LAMBDA { return to_float(grad[i]) * (1.0f + scale[i]); });
  const float along = sum_of_columns(width, [=](std::int64_t i) U4D_INLINE_LAMBDA {
    return to_float(grad[i]) * (1.0f + scale[i]) * ((to_float(x[i]) - mean) * inverse);
  });
  return {mean, inverse, grad_sum / columns, along / columns};
}

// The gradient of one column of x; those of shift and scale are added to its sums.
U4D_INLINE float norm_column_grad(float grad, float x, float scale, const NormStatistics& row, float& shift_sum,
                                  float& scale_sum) {
  const float normed = (x - row.mean) * row.inverse;
  shift_sum += grad;
  scale_sum += grad * normed;
  return (grad * (1.0f + scale) - row.grad_mean - normed * row.along) * row.inverse;
}

// Calls `row_grad(row, place, sums)` for all rows; `sums` is where the row's part of its frame adds up `kTables`
// tables: partials [parts, kTables, streams, batch, frames, width], table by table `stride` apart.
template <int kTables, class RowGrad>
void for_parts_of_frames(int num_threads, const RowSizes& sizes, std::int64_t rows_per_part, float* partials,
                         const RowGrad& row_grad) {
  const FrameParts by = parts_of(sizes, rows_per_part);
  const std::int64_t stride = by.groups * sizes.width;
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * sizes.width > 16384)
  for (std::int64_t task = 0; task < by.tasks(); ++task) {
    const std::int64_t group = task / by.parts, part = task % by.parts;
    float* sums = partials + part * kTables * stride + group * sizes.width;
    for (int table = 0; table < kTables; ++table) std::fill_n(sums + table * stride, sizes.width, 0.0f);
    const FramePlace place = place_of(group * sizes.patches, sizes);
    const std::int64_t first = part * rows_per_part, last = std::min(first + rows_per_part, sizes.patches);
    for (std::int64_t patch = first; patch < last; ++patch) {
      row_grad(group * sizes.patches + patch, place, sums, stride);
    }
  }
}

}  // namespace u4d
