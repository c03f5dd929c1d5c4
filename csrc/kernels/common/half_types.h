// Floating types that cross into kernels: float32, bfloat16 and float16; arithmetic on them is float32.
//
// One source for nvcc, for CPU kernels (branch-free, so that loops over it are vectorised) and for the host shim. A
// value is rounded to nearest, ties to even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/host_device.h"
#include "kernels/common/status.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace u4d {

// How a launcher is told the type behind a `void*`; u4d_fast/backend.py has the same numbers (DTYPE_CODES).
constexpr std::int64_t kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2;

struct Bfloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

// Calls `call(value)` with a value of the type that a code stands for. Host code.
template <class Call>
Status with_type(std::int64_t dtype, const Call& call) {
  if (dtype == kFloat32) return call(float{});
  if (dtype == kBfloat16) return call(Bfloat16{});
  if (dtype == kFloat16) return call(Float16{});
  return kInvalidArgument;
}

namespace half_types_detail {

template <class To, class From>
U4D_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

U4D_HD std::uint16_t round_to_bfloat16(float value) {
#if defined(__CUDACC__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded);
#endif
}

U4D_HD float widen_float16(std::uint16_t half) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(half));
#else
  // Exponent and mantissa in float's places; a product with 2^112 moves the exponent and is exact for subnormals too.
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  const std::uint32_t finite = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const std::uint32_t special = magnitude | 0x7f800000u;  // inf or NaN
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  return bit_cast<float>(sign | (magnitude >= (0x7c00u << 13) ? special : finite));
#endif
}

U4D_HD std::uint16_t round_to_float16(float value) {
#if defined(__CUDACC__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(value), sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 a sum with 0.5 puts the value's last bit at the mantissa's end, and the addition rounds.
  const std::uint32_t small =
      bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<std::uint32_t>(0.5f);
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  std::uint32_t half = magnitude < (113u << 23) ? small : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;  // 2^16 and more: infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;    // NaN
  return static_cast<std::uint16_t>(sign | half);
#endif
}

}  // namespace half_types_detail

U4D_HD float to_float(float value) { return value; }
U4D_HD float to_float(Bfloat16 value) {
  return half_types_detail::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
U4D_HD float to_float(Float16 value) { return half_types_detail::widen_float16(value.bits); }

// Rounds into `to`; the type of `to` chooses the rounding.
U4D_HD void round_to(float value, float& to) { to = value; }
U4D_HD void round_to(float value, Bfloat16& to) { to.bits = half_types_detail::round_to_bfloat16(value); }
U4D_HD void round_to(float value, Float16& to) { to.bits = half_types_detail::round_to_float16(value); }

// As many neighbours as 16 bytes hold: one memory access on a GPU.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// `from` and `to` are aligned to 16 bytes.
template <class T>
U4D_HD Vector<T> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <class T>
U4D_HD void store_vector(T* to, const Vector<T>& vector) {
  *reinterpret_cast<Vector<T>*>(to) = vector;
}

// Whether every row that begins at `pointer` and is `stride` elements apart can be read by vectors. Host code.
template <class T>
bool takes_vectors(const T* pointer, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0 && stride % Vector<T>::kSize == 0;
}

}  // namespace u4d
