#include "kernels/gated_residual/gated_residual.h"

#include "kernels/common/vectorise.h"
#include "kernels/gated_residual_norm/frame_rows_cpu.h"

namespace u4d {
namespace {

// One function per type: GCC makes no clones of a template.
U4D_CLONES void gate(const float* x, const float* update, const float* gate, float* out, std::int64_t width) {
  gate_row(x, update, gate, out, width);
}

U4D_CLONES void gate(const Bfloat16* x, const Bfloat16* update, const float* gate, Bfloat16* out, std::int64_t width) {
  gate_row(x, update, gate, out, width);
}

U4D_CLONES void gate(const Float16* x, const Float16* update, const float* gate, Float16* out, std::int64_t width) {
  gate_row(x, update, gate, out, width);
}

}  // namespace

Status gated_residual_cpu(int num_threads, const void* x, const void* update, const float* gates, void* out,
                          std::int64_t dtype, std::int64_t streams, std::int64_t batch, std::int64_t frames,
                          std::int64_t patches, std::int64_t width, std::int64_t gate_stream, std::int64_t gate_clip,
                          std::int64_t gate_frame) {
  const RowSizes sizes{streams, batch, frames, patches, width};
  const Status status = check_rows(sizes);
  if (status != kOk) return status;
  const FrameTable table{gates, gate_stream, gate_clip, gate_frame};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    const T* added = static_cast<const T*>(update);
    T* to = static_cast<T*>(out);
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * width > 16384)
    for (std::int64_t row = 0; row < sizes.rows(); ++row) {
      const std::int64_t at = row * width;
      gate(from + at, added + at, row_of(table, place_of(row, sizes)), to + at, width);
    }
    return kOk;
  });
}

}  // namespace u4d
