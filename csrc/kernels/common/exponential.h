// exp for CPU kernels, without a call.
#pragma once

#include <cstdint>

#include "kernels/common/half_types.h"

namespace u4d {

// Loops over it are vectorised; within 2 units in the last place. Below -87 it stays at the smallest normal number,
// from 88.4 on it is infinite, of NaN too: who calls it keeps NaN. Source: Cephes, expf.
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

}  // namespace u4d
