#include "kernels/quantize_rows/quantize_rows.h"

#include "kernels/common/vectorise.h"
#include "kernels/quantize_rows/quantize_row_cpu.h"

namespace u4d {
namespace {

// One function per type: GCC makes no clones of a template.
U4D_CLONES float quantize(const float* row, E4m3* values, std::int64_t width) {
  return quantize_row(row, values, width);
}

U4D_CLONES float quantize(const Bfloat16* row, E4m3* values, std::int64_t width) {
  return quantize_row(row, values, width);
}

U4D_CLONES float quantize(const Float16* row, E4m3* values, std::int64_t width) {
  return quantize_row(row, values, width);
}

}  // namespace

Status quantize_rows_cpu(int num_threads, const void* x, E4m3* values, float* scale, std::int64_t dtype,
                         std::int64_t rows, std::int64_t width) {
  const Status status = check_quantized(rows, width);
  if (status != kOk) return status;
  return with_type(dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(x);
#pragma omp parallel for num_threads(num_threads) if (rows * width > 16384)
    for (std::int64_t row = 0; row < rows; ++row) {
      scale[row] = quantize(from + row * width, values + row * width, width);
    }
    return kOk;
  });
}

}  // namespace u4d
