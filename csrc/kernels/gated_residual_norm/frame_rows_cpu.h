// One row at a time on the CPU. Inline bodies for U4D_CLONES functions; arithmetic is float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/gated_residual_norm/frame_rows.h"

namespace u4d {

constexpr std::int64_t kLanes = 32;  // partial sums; enough for the widest vectors to hide an addition's latency

// The sum of term(column), in an order that does not depend on the machine's vectors.
template <class Term>
U4D_INLINE float sum_of_columns(std::int64_t width, const Term& term) {
  float lanes[kLanes] = {};
  std::int64_t first = 0;
  for (; first + kLanes <= width; first += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(first + lane);
  }
  for (std::int64_t lane = 0; first + lane < width; ++lane) lanes[lane] += term(first + lane);
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// x + update * gate
template <class T>
U4D_INLINE void gate_row(const T* x, const T* update, const float* gate, T* out, std::int64_t width) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) round_to(to_float(x[i]) + to_float(update[i]) * gate[i], out[i]);
}

// Layer norm of a row, then * (1 + scale) + shift.
template <class T, class Out>
U4D_INLINE void norm_row(const T* x, const float* shift, const float* scale, Out* out, std::int64_t width, float eps) {
  const float columns = static_cast<float>(width);
  const float mean = sum_of_columns(width, [=](std::int64_t i) U4D_INLINE_LAMBDA { return to_float(x[i]); }) / columns;
  const float squares = sum_of_columns(width, [=](std::int64_t i) U4D_INLINE_LAMBDA {
    const float centred = to_float(x[i]) - mean;
    return centred * centred;
  });
  const float inverse = 1.0f / std::sqrt(squares / columns + eps);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) {
    round_to((to_float(x[i]) - mean) * inverse * (1.0f + scale[i]) + shift[i], out[i]);
  }
}

}  // namespace u4d
