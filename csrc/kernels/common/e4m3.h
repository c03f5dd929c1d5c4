// e4m3, 8-bit floating numbers with 4 bits of exponent and 3 of mantissa, and the scale of a row of them.
//
// The largest is 448, the smallest step 2^-9; there is a NaN and no infinity. A value is rounded to nearest, ties to
// even; what is larger than 448 becomes 448, and NaN stays NaN.
#pragma once

#include <cstdint>

#include "kernels/common/half_types.h"
#include "kernels/common/host_device.h"

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

namespace u4d {

constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestScale = 0x1p-126f;  // the smallest normal float: the inverse is one too

struct E4m3 {
  std::uint8_t bits;
};

U4D_HD void round_to(float value, E4m3& to) {
#if defined(__CUDACC__)
  to.bits = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
#else
  using half_types_detail::bit_cast;
  const std::uint32_t bits = bit_cast<std::uint32_t>(value), sign = (bits >> 24) & 0x80u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-6 a sum with 2^14 puts steps of 2^-9 at the mantissa's end, and the addition rounds.
  const std::uint32_t small =
      bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0x1p14f) - bit_cast<std::uint32_t>(0x1p14f);
  const std::uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  std::uint32_t code = magnitude < (121u << 23) ? small : normal;
  code = magnitude >= (135u << 23) + (6u << 20) ? 0x7eu : code;  // 448 and more, infinity too
  to.bits = static_cast<std::uint8_t>(magnitude > 0x7f800000u ? 0x7fu : sign | code);
#endif
}

// The bits of |value|: ordered like magnitudes as whole numbers, with infinity above all numbers and NaN above
// infinity.
U4D_HD std::uint32_t magnitude_bits(float value) {
  return half_types_detail::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
}

// The scale of a row whose largest magnitude has these bits: that magnitude over 448, at least kSmallestScale; 1 for a
// row of zeros, NaN for one with NaN or infinity in it.
U4D_HD float scale_of_row(std::uint32_t largest) {
  using half_types_detail::bit_cast;
  if (largest == 0) return 1.0f;
  if (largest >= 0x7f800000u) return bit_cast<float>(0x7fc00000u);
  const float scale = bit_cast<float>(largest) / kLargestE4m3;
  return scale > kSmallestScale ? scale : kSmallestScale;
}

}  // namespace u4d
