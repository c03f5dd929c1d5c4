#include "kernels/gated_residual_norm/gated_residual_norm.h"

#include "kernels/common/vectorise.h"
#include "kernels/gated_residual_norm/frame_rows_cpu.h"

namespace u4d {
namespace {

struct TableRows {
  const float *gate, *shift, *scale;
};

// One function per type: GCC makes no clones of a template.
U4D_CLONES void gate_and_norm(const float* x, const float* update, const TableRows& rows, float* x_new, float* normed,
                              std::int64_t width, float eps) {
  gate_row(x, update, rows.gate, x_new, width);
  norm_row(x_new, rows.shift, rows.scale, normed, width, eps);
}

U4D_CLONES void gate_and_norm(const Bfloat16* x, const Bfloat16* update, const TableRows& rows, Bfloat16* x_new,
                              Bfloat16* normed, std::int64_t width, float eps) {
  gate_row(x, update, rows.gate, x_new, width);
  norm_row(x_new, rows.shift, rows.scale, normed, width, eps);
}

U4D_CLONES void gate_and_norm(const Float16* x, const Float16* update, const TableRows& rows, Float16* x_new,
                              Float16* normed, std::int64_t width, float eps) {
  gate_row(x, update, rows.gate, x_new, width);
  norm_row(x_new, rows.shift, rows.scale, normed, width, eps);
}

}  // namespace

Status gated_residual_norm_cpu(int num_threads, const void* x, const void* update, const float* gate,
                               const float* shift, const float* scale, void* x_new, void* normed, std::int64_t dtype,
                               std::int64_t streams, std::int64_t batch, std::int64_t frames, std::int64_t patches,
                               std::int64_t width, std::int64_t gate_stream, std::int64_t gate_clip,
                               std::int64_t gate_frame, std::int64_t shift_stream, std::int64_t shift_clip,
                               std::int64_t shift_frame, std::int64_t scale_stream, std::int64_t scale_clip,
                               std::int64_t scale_frame, double eps) {
  const RowSizes sizes{streams, batch, frames, patches, width};
  const Status status = check_rows(sizes);
  if (status != kOk) return status;
  const FrameTable gates{gate, gate_stream, gate_clip, gate_frame};
  const FrameTable shifts{shift, shift_stream, shift_clip, shift_frame};
  const FrameTable scales{scale, scale_stream, scale_clip, scale_frame};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    const T* added = static_cast<const T*>(update);
    T* updated = static_cast<T*>(x_new);
    T* to = static_cast<T*>(normed);
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * width > 16384)
    for (std::int64_t row = 0; row < sizes.rows(); ++row) {
      const FramePlace place = place_of(row, sizes);
      const TableRows rows{row_of(gates, place), row_of(shifts, place), row_of(scales, place)};
      const std::int64_t at = row * width;
      gate_and_norm(from + at, added + at, rows, updated + at, to + at, width, static_cast<float>(eps));
    }
    return kOk;
  });
}

}  // namespace u4d
