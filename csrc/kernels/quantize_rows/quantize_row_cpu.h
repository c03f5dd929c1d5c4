// One row at a time on the CPU. An inline body for U4D_CLONES functions.
#pragma once

#include <cstdint>

#include "kernels/common/e4m3.h"

namespace u4d {

// Writes a row's values and returns its scale.
template <class T>
U4D_INLINE float quantize_row(const T* row, E4m3* values, std::int64_t width) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < width; ++i) {
    const std::uint32_t magnitude = magnitude_bits(to_float(row[i]));
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = scale_of_row(largest), inverse = 1.0f / scale;
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) round_to(to_float(row[i]) * inverse, values[i]);
  return scale;
}

}  // namespace u4d
