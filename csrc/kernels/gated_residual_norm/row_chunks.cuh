// A row of activations in the registers of some warps: chunks of 8 neighbouring columns (16 bytes of a half type, 2 x
// 16 of float32), how they are read and written, and what all warps of the row add up.
#pragma once

#include "kernels/common/launch.h"

#include "kernels/common/half_types.h"

namespace u4d::frame_rows {

constexpr int kChunk = 8;       // columns
constexpr int kMostChunks = 4;  // of a lane: 32 registers hold its part of the row

struct Chunk {
  float values[kChunk];
};

// Columns first..first+7 of a row, zeros beyond its end. With kVectors the row is aligned to 16 bytes and its width a
// multiple of 8.
template <bool kVectors, class T>
__device__ __forceinline__ Chunk load_chunk(const T* row, int first, int width) {
  Chunk chunk;
  if constexpr (kVectors) {
    constexpr int kSize = Vector<T>::kSize;
    if (first < width) {
#pragma unroll
      for (int part = 0; part < kChunk; part += kSize) {
        const Vector<T> vector = load_vector(row + first + part);
#pragma unroll
        for (int i = 0; i < kSize; ++i) chunk.values[part + i] = to_float(vector.values[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) chunk.values[i] = 0.0f;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunk.values[i] = first + i < width ? to_float(row[first + i]) : 0.0f;
  }
  return chunk;
}

// Writes a chunk, and leaves in it what was written: the values after rounding.
template <bool kVectors, class T>
__device__ __forceinline__ void store_chunk(T* row, int first, int width, Chunk& chunk) {
  T rounded[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    round_to(chunk.values[i], rounded[i]);
    chunk.values[i] = to_float(rounded[i]);
  }
  if constexpr (kVectors) {
    constexpr int kSize = Vector<T>::kSize;
    if (first >= width) return;
#pragma unroll
    for (int part = 0; part < kChunk; part += kSize) {
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < kSize; ++i) vector.values[i] = rounded[part + i];
      store_vector(row + first + part, vector);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (first + i < width) row[first + i] = rounded[i];
    }
  }
}

// The sum over the warps of a row, the same in all their lanes. `slots` is used once per kernel.
__device__ __forceinline__ float sum_of_row(float mine, int warps_per_row, float* slots) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, lanes);
  if (warps_per_row == 1) return mine;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) slots[warp] = mine;
  __syncthreads();
  float total = 0.0f;
  const int first = warp / warps_per_row * warps_per_row;
  for (int k = 0; k < warps_per_row; ++k) total += slots[first + k];
  return total;
}

// Column `i` of a chunk that begins at `first` counts.
template <bool kVectors>
__device__ __forceinline__ bool is_column(int first, int i, int width) {
  return kVectors ? first < width : first + i < width;
}

}  // namespace u4d::frame_rows
