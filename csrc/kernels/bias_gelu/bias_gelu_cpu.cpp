#include "kernels/bias_gelu/bias_gelu.h"

#include "kernels/common/vectorise.h"

namespace u4d {
namespace {

// exp without a call, so that loops over it are vectorised; within 2 units in the last place. Below -87 it stays at the
// smallest normal number, from 88.4 on it is infinite. Source: Cephes, expf.
U4D_INLINE float exponential(float x) {
  x = x < 89.0f ? x : 89.0f;
  x = x > -87.0f ? x : -87.0f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float whole = (x * 1.44269504088896341f + kShift) - kShift;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::int32_t power = (static_cast<std::int32_t>(whole) + 127) << 23;
  return p * half_types_detail::bit_cast<float>(power);
}

template <class T, class B>
U4D_INLINE void activate_row(const T* x, const B* bias, T* out, std::int64_t width) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) {
    const float v = to_float(x[i]) + to_float(bias[i]);
    round_to(v / (1.0f + exponential(gelu_exponent(v))), out[i]);
  }
}

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
