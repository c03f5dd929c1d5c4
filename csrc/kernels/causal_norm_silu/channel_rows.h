// What the CPU and the CUDA kernel of causal_norm_silu share.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/half_types.h"
#include "kernels/common/host_device.h"

namespace u4d::channel_rows {

// Arguments of a kernel with their types; see causal_norm_silu.h.
template <class T, class W>
struct Arguments {
  const T *x, *residual, *before;
  const W *gamma, *bias;
  T *total, *normed;
  std::int64_t batch, rows, front;
  int width;

  bool empty() const { return batch == 0 || front + rows == 0 || width == 0; }
};

// What a row is multiplied by besides gamma; NaN stays NaN.
U4D_HD float inverse_norm(float squares, int width) {
  constexpr float kLeast = 1e-12f;
  const float norm = sqrtf(squares);
  return sqrtf(static_cast<float>(width)) / (norm < kLeast ? kLeast : norm);
}

template <class T>
U4D_HD float rounded(float value, T& to) {
  round_to(value, to);
  return to_float(to);
}

// Calls `call(arguments)` with the types that the codes stand for. Host code.
template <class Call>
Status with_arguments(const void* x, const void* residual, const void* before, const void* gamma, const void* bias,
                      void* total, void* normed, std::int64_t dtype, std::int64_t weight_dtype, std::int64_t batch,
                      std::int64_t rows, std::int64_t front, std::int64_t width, const Call& call) {
  if (batch < 0 || rows < 0 || front < 0 || width < 0) return kInvalidArgument;
  if (weight_dtype != dtype && weight_dtype != kFloat32) return kInvalidArgument;
  if (width > (1 << 30)) return kTooLarge;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const auto typed = [&](auto w) {
      using W = decltype(w);
      return call(Arguments<T, W>{static_cast<const T*>(x), static_cast<const T*>(residual),
                                  static_cast<const T*>(before), static_cast<const W*>(gamma),
                                  static_cast<const W*>(bias), static_cast<T*>(total), static_cast<T*>(normed), batch,
                                  rows, front, static_cast<int>(width)});
    };
    return weight_dtype == kFloat32 ? typed(float{}) : typed(t);
  });
}

}  // namespace u4d::channel_rows
