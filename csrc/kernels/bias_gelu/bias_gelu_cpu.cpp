#include "kernels/bias_gelu/bias_gelu.h"

#include "kernels/bias_gelu/gelu_rows_cpu.h"
#include "kernels/common/vectorise.h"

namespace u4d {
namespace {

// One function per pair of types: GCC makes no clones of a template.
U4D_CLONES void activate(const float* x, const float* bias, float* out, std::int64_t width) {
  activate_row(x, bias, out, width);
}

U4D_CLONES void activate(const Bfloat16* x, const float* bias, Bfloat16* out, std::int64_t width) {
  activate_row(x, bias, out, width);
}

U4D_CLONES void activate(const Bfloat16* x, const Bfloat16* bias, Bfloat16* out, std::int64_t width) {
  activate_row(x, bias, out, width);
}

U4D_CLONES void activate(const Float16* x, const float* bias, Float16* out, std::int64_t width) {
  activate_row(x, bias, out, width);
}

U4D_CLONES void activate(const Float16* x, const Float16* bias, Float16* out, std::int64_t width) {
  activate_row(x, bias, out, width);
}

template <class T, class B>
Status activate_all(int num_threads, const T* x, const B* bias, T* out, std::int64_t streams, std::int64_t rows,
                    std::int64_t width) {
#pragma omp parallel for num_threads(num_threads) if (streams * rows * width > 4096)
  for (std::int64_t row = 0; row < streams * rows; ++row) {
    activate(x + row * width, bias + row / rows * width, out + row * width, width);
  }
  return kOk;
}

}  // namespace

Status bias_gelu_cpu(int num_threads, const void* x, const void* bias, void* out, std::int64_t dtype,
                     std::int64_t bias_dtype, std::int64_t streams, std::int64_t rows, std::int64_t width) {
  if (streams < 0 || rows < 0 || width < 0 || (bias_dtype != dtype && bias_dtype != kFloat32)) return kInvalidArgument;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    if (bias_dtype == kFloat32) {
      return activate_all(num_threads, from, static_cast<const float*>(bias), to, streams, rows, width);
    }
    return activate_all(num_threads, from, static_cast<const T*>(bias), to, streams, rows, width);
  });
}

}  // namespace u4d
