#include "kernels/ada_layer_norm_fp8/ada_layer_norm_fp8.h"

#include "kernels/ada_layer_norm_fp8/norm_row_fp8_cpu.h"
#include "kernels/common/vectorise.h"

namespace u4d {
namespace {

// One function per type: GCC makes no clones of a template.
U4D_CLONES float norm(const float* x, const float* shift, const float* scale, E4m3* values, std::int64_t width,
                      float eps) {
  return norm_row_fp8(x, shift, scale, values, width, eps);
}

U4D_CLONES float norm(const Bfloat16* x, const float* shift, const float* scale, E4m3* values, std::int64_t width,
                      float eps) {
  return norm_row_fp8(x, shift, scale, values, width, eps);
}

U4D_CLONES float norm(const Float16* x, const float* shift, const float* scale, E4m3* values, std::int64_t width,
                      float eps) {
  return norm_row_fp8(x, shift, scale, values, width, eps);
}

}  // namespace

Status ada_layer_norm_fp8_cpu(int num_threads, const void* x, const float* shift, const float* scale, E4m3* values,
                              float* row_scale, std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                              std::int64_t frames, std::int64_t patches, std::int64_t width, std::int64_t shift_stream,
                              std::int64_t shift_clip, std::int64_t shift_frame, std::int64_t scale_stream,
                              std::int64_t scale_clip, std::int64_t scale_frame, double eps) {
  const RowSizes sizes{streams, batch, frames, patches, width};
  const Status status = check_rows(sizes);
  if (status != kOk) return status;
  const FrameTable shifts{shift, shift_stream, shift_clip, shift_frame};
  const FrameTable scales{scale, scale_stream, scale_clip, scale_frame};
  return with_type(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(x);
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * width > 16384)
    for (std::int64_t row = 0; row < sizes.rows(); ++row) {
      const FramePlace place = place_of(row, sizes);
      row_scale[row] = norm(from + row * width, row_of(shifts, place), row_of(scales, place), values + row * width,
                            width, static_cast<float>(eps));
    }
    return kOk;
  });
}

}  // namespace u4d
