// The derivative of GELU's tanh form, for the CPU and the GPU.
#pragma once

#include "kernels/bias_gelu/bias_gelu.h"

namespace u4d {

// Beyond it the slope is 1, or 0 but for 3e-35, and exp(-2u) is not yet infinite. NaN stays NaN.
U4D_HD float where_gelu_bends(float v) {
  constexpr float kFlat = 9.9f;
  v = v > kFlat ? kFlat : v;
  return v < -kFlat ? -kFlat : v;
}

// With gelu = v s and s = 1 / (1 + t), t = exp(-2u): the slope is s + v 2u' t s^2. Takes v of where_gelu_bends, t, s.
U4D_HD float gelu_slope(float v, float t, float s) {
  constexpr float kFactor = 1.5957691216057308f, kCube = 0.044715f;  // 2 sqrt(2 / pi)
  return s * (1.0f + v * (kFactor + 3.0f * kFactor * kCube * (v * v)) * (t * s));
}

}  // namespace u4d
