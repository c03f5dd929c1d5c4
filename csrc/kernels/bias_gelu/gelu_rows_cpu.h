// GELU of one row at a time on the CPU. Inline bodies for U4D_CLONES functions; arithmetic is float32.
#pragma once

#include <cstdint>

#include "kernels/bias_gelu/bias_gelu.h"
#include "kernels/common/exponential.h"

namespace u4d {

// gelu(x + bias)
template <class T, class B, class Out>
U4D_INLINE void activate_row(const T* x, const B* bias, Out* out, std::int64_t width) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) {
    const float v = to_float(x[i]) + to_float(bias[i]);
    round_to(v / (1.0f + exponential(gelu_exponent(v))), out[i]);
  }
}

}  // namespace u4d
