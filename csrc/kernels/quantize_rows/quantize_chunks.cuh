// The last step of a kernel that makes rows of e4m3: the row lies in the registers of some warps, as float32.
#pragma once

#include "kernels/common/e4m3.h"
#include "kernels/gated_residual_norm/row_chunks.cuh"

namespace u4d {

// The largest over the warps of a row, the same in all their lanes. `slots`, one for each warp, is used once per
// kernel.
__device__ __forceinline__ std::uint32_t largest_of_row(std::uint32_t mine, int warps_per_row, std::uint32_t* slots) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) mine = max(mine, __shfl_xor_sync(0xffffffffu, mine, lanes));
  if (warps_per_row == 1) return mine;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) slots[warp] = mine;
  __syncthreads();
  std::uint32_t largest = 0;
  const int first = warp / warps_per_row * warps_per_row;
  for (int k = 0; k < warps_per_row; ++k) largest = max(largest, slots[first + k]);
  return largest;
}

struct alignas(8) Codes {
  E4m3 values[frame_rows::kChunk];
};

// With kVectors the row is aligned to 8 bytes and its width a multiple of 8.
template <bool kVectors>
__device__ __forceinline__ void store_codes(E4m3* row, int first, int width, const Codes& codes) {
  if constexpr (kVectors) {
    if (first < width) *reinterpret_cast<Codes*>(row + first) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < frame_rows::kChunk; ++i) {
      if (first + i < width) row[first + i] = codes.values[i];
    }
  }
}

// Writes a row and its scale; chunk c of this thread begins at column own + c * step. Columns beyond the row's end hold
// zeros. Nothing is written where `width` is 0. Every thread of the block comes here once.
template <bool kVectors, int kChunks>
__device__ __forceinline__ void quantize_chunks(const frame_rows::Chunk (&chunks)[kChunks], int own, int step,
                                                int width, int warps_per_row, std::uint32_t* slots, E4m3* values,
                                                float* scale) {
  std::uint32_t largest = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < frame_rows::kChunk; ++i) largest = max(largest, magnitude_bits(chunks[c].values[i]));
  }
  const float row_scale = scale_of_row(largest_of_row(largest, warps_per_row, slots));
  const float inverse = 1.0f / row_scale;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    Codes codes;
#pragma unroll
    for (int i = 0; i < frame_rows::kChunk; ++i) round_to(chunks[c].values[i] * inverse, codes.values[i]);
    store_codes<kVectors>(values, own + c * step, width, codes);
  }
  if (own == 0 && width > 0) *scale = row_scale;
}

}  // namespace u4d
