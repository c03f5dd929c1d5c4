// Two neighbouring channels of a head, normed and turned, on the CPU. An inline body for U4D_CLONES functions.
#pragma once

#include <cstdint>

#include "kernels/common/half_types.h"

namespace u4d {

struct Pair {
  float even, odd;
};

// Pair p of a head; `inverse` is that of the whole row's root mean square.
template <class T, class W>
U4D_INLINE Pair turned_pair(const T* x, const W* weight, const float* cos, const float* sin, std::int64_t p,
                            float inverse) {
  const float even = to_float(x[2 * p]) * inverse * to_float(weight[2 * p]);
  const float odd = to_float(x[2 * p + 1]) * inverse * to_float(weight[2 * p + 1]);
  return {even * cos[p] - odd * sin[p], even * sin[p] + odd * cos[p]};
}

}  // namespace u4d
