// What test_e4m3.py asks of csrc/kernels/common/e4m3.h.
#include "kernels/common/e4m3.h"

namespace u4d {

U4D_KERNEL void round_all(const float* from, E4m3* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) round_to(from[i], to[i]);
}

U4D_KERNEL void scale_all(const float* from, float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = scale_of_row(magnitude_bits(from[i]));
}

}  // namespace u4d
