#include "kernels/gated_residual_norm_fp8/gated_residual_norm_fp8.h"

#include "kernels/ada_layer_norm_fp8/norm_row_fp8_cpu.h"
#include "kernels/common/vectorise.h"

namespace u4d {
namespace {

struct TableRows {
  const float *gate, *shift, *scale;
};

// One function per type: GCC makes no clones of a template.
U4D_CLONES float gate_and_norm(const float* x, const float* update, const TableRows& rows, float* x_new, E4m3* values,
                               std::int64_t width, float eps) {
  gate_row(x, update, rows.gate, x_new, width);
  return norm_row_fp8(x_new, rows.shift, rows.scale, values, width, eps);
}

U4D_CLONES float gate_and_norm(const Bfloat16* x, const Bfloat16* update, const TableRows& rows, Bfloat16* x_new,
                               E4m3* values, std::int64_t width, float eps) {
  gate_row(x, update, rows.gate, x_new, width);
  return norm_row_fp8(x_new, rows.shift, rows.scale, values, width, eps);
}

U4D_CLONES float gate_and_norm(const Float16* x, const Float16* update, const TableRows& rows, Float16* x_new,
                               E4m3* values, std::int64_t width, float eps) {
  gate_row(x, update, rows.gate, x_new, width);
  return norm_row_fp8(x_new, rows.shift, rows.scale, values, width, eps);
}

}  // namespace

Status gated_residual_norm_fp8_cpu(int num_threads, const void* x, const void* update, const float* gate,
                                   const float* shift, const float* scale, void* x_new, E4m3* values, float* row_scale,
                                   std::int64_t dtype, std::int64_t streams, std::int64_t batch, std::int64_t frames,
                                   std::int64_t patches, std::int64_t width, std::int64_t gate_stream,
                                   std::int64_t gate_clip, std::int64_t gate_frame, std::int64_t shift_stream,
                                   std::int64_t shift_clip, std::int64_t shift_frame, std::int64_t scale_stream,
                                   std::int64_t scale_clip, std::int64_t scale_frame, double eps) {
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
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * width > 16384)
    for (std::int64_t row = 0; row < sizes.rows(); ++row) {
      const FramePlace place = place_of(row, sizes);
      const TableRows rows{row_of(gates, place), row_of(shifts, place), row_of(scales, place)};
      const std::int64_t at = row * width;
      row_scale[row] =
          gate_and_norm(from + at, added + at, rows, updated + at, values + at, width, static_cast<float>(eps));
    }
    return kOk;
  });
}

}  // namespace u4d
