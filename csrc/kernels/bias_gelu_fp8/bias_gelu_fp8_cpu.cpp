#include "kernels/bias_gelu_fp8/bias_gelu_fp8.h"

#include "kernels/bias_gelu/gelu_rows_cpu.h"
#include "kernels/common/vectorise.h"
#include "kernels/quantize_rows/quantize_row_cpu.h"
#include "kernels/quantize_rows/quantize_rows.h"

namespace u4d {
namespace {

template <class T, class B>
U4D_INLINE float quantized_gelu_row(const T* x, const B* bias, E4m3* values, std::int64_t width) {
  float activated[kMostQuantized];
  activate_row(x, bias, activated, width);
  return quantize_row(activated, values, width);
}

// One function per pair of types: GCC makes no clones of a template.
U4D_CLONES float activate(const float* x, const float* bias, E4m3* values, std::int64_t width) {
  return quantized_gelu_row(x, bias, values, width);
}

U4D_CLONES float activate(const Bfloat16* x, const float* bias, E4m3* values, std::int64_t width) {
  return quantized_gelu_row(x, bias, values, width);
}

U4D_CLONES float activate(const Bfloat16* x, const Bfloat16* bias, E4m3* values, std::int64_t width) {
  return quantized_gelu_row(x, bias, values, width);
}

U4D_CLONES float activate(const Float16* x, const float* bias, E4m3* values, std::int64_t width) {
  return quantized_gelu_row(x, bias, values, width);
}

U4D_CLONES float activate(const Float16* x, const Float16* bias, E4m3* values, std::int64_t width) {
  return quantized_gelu_row(x, bias, values, width);
}

template <class T, class B>
Status activate_all(int num_threads, const T* x, const B* bias, E4m3* values, float* scale, std::int64_t streams,
                    std::int64_t rows, std::int64_t width) {
#pragma omp parallel for num_threads(num_threads) if (streams * rows * width > 4096)
  for (std::int64_t row = 0; row < streams * rows; ++row) {
    scale[row] = activate(x + row * width, bias + row / rows * width, values + row * width, width);
  }
  return kOk;
}

}  // namespace

Status bias_gelu_fp8_cpu(int num_threads, const void* x, const void* bias, E4m3* values, float* scale,
                         std::int64_t dtype, std::int64_t bias_dtype, std::int64_t streams, std::int64_t rows,
                         std::int64_t width) {
  if (streams < 0 || rows < 0 || (bias_dtype != dtype && bias_dtype != kFloat32)) return kInvalidArgument;
  const Status status = check_quantized(streams * rows, width);
  if (status != kOk) return status;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    if (bias_dtype == kFloat32) {
      return activate_all(num_threads, from, static_cast<const float*>(bias), values, scale, streams, rows, width);
    }
    return activate_all(num_threads, from, static_cast<const T*>(bias), values, scale, streams, rows, width);
  });
}

}  // namespace u4d
