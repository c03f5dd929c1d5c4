// Softmax over tiles of scores as the tensor cores leave them in registers: each thread has two rows, 8 apart, and of
// each 8 columns two neighbours; four neighbouring threads have the whole rows (hopper.h).
#pragma once

#include <cmath>

#include "kernels/common/hopper.h"
#include "kernels/common/launch.h"

namespace u4d {

struct RowState {
  float largest[2];  // score so far, before scaling
  float sum[2];      // of this thread's weights
};

__device__ __forceinline__ RowState empty_rows() { return {{-INFINITY, -INFINITY}, {0.0f, 0.0f}}; }

__device__ __forceinline__ float max_of_four_threads(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sum_of_four_threads(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Keys from `count` on belong to others.
template <int kCount>
__device__ __forceinline__ void hide_columns_from(int count, float (&scores)[kCount], float hidden = -INFINITY) {
  const int first = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (8 * (i / 4) + first + i % 2 >= count) scores[i] = hidden;
  }
}

// Keys before `count` do.
template <int kCount>
__device__ __forceinline__ void hide_columns_before(int count, float (&scores)[kCount]) {
  const int first = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (8 * (i / 4) + first + i % 2 < count) scores[i] = -INFINITY;
  }
}

// Scores -> weights exp2(scale (score - largest) + kExponent), in place; each row has its scale. `shrink` is what
// earlier results have to be multiplied by.
template <int kExponent, int kCount>
__device__ __forceinline__ void to_weights(const float (&scale)[2], float (&scores)[kCount], RowState& state,
                                           float (&shrink)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = state.largest[row];
#pragma unroll
    for (int i = 2 * row; i < kCount; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
    largest = max_of_four_threads(largest);
    shrink[row] = hopper::exp2_approx(scale[row] * (state.largest[row] - largest));
    state.largest[row] = largest;
    const float shift = scale[row] * largest - kExponent;
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * row; i < kCount; i += 4) {
      scores[i] = hopper::exp2_approx(fmaf(scale[row], scores[i], -shift));
      scores[i + 1] = hopper::exp2_approx(fmaf(scale[row], scores[i + 1], -shift));
      sum += scores[i] + scores[i + 1];
    }
    state.sum[row] = fmaf(state.sum[row], shrink[row], sum);
  }
}

// Two neighbouring columns of a product are two neighbouring columns of the next one's left factor.
template <int kCount>
__device__ __forceinline__ void pack_weights(const float (&weights)[kCount], uint32_t (&packed)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) packed[i] = hopper::pack_bf16(weights[2 * i], weights[2 * i + 1]);
}

template <int kCount>
__device__ __forceinline__ void multiply_rows(const float (&factor)[2], float (&results)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) results[i] *= factor[i / 2 % 2];
}

// How weights times values become results, where the tensor cores keep float32: they add to the results themselves.
template <int kCount>
struct SumInCores {
  using Registers = float[kCount];
  Registers results;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) results[i] = 0.0f;
  }
  // Where the products of the tile at hand go.
  __device__ __forceinline__ Registers& products() { return results; }
  // These products are complete, and what comes next is relative to another largest score.
  __device__ __forceinline__ void take(const float (&shrink)[2]) { multiply_rows(shrink, results); }
  // The last products are complete.
  __device__ __forceinline__ void finish() {}
};

// Where they do not, each tile's products begin at zero and are added here.
template <int kCount>
struct SumOfTiles {
  using Registers = float[kCount];
  Registers results, tile;
  float factor[2];  // that the results have to be multiplied by

  __device__ __forceinline__ void clear() {
    factor[0] = factor[1] = 1.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) results[i] = 0.0f;
  }
  __device__ __forceinline__ Registers& products() { return tile; }
  __device__ __forceinline__ void take(const float (&shrink)[2]) {
    finish();
    factor[0] = shrink[0], factor[1] = shrink[1];
  }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) results[i] = fmaf(results[i], factor[i / 2 % 2], tile[i]);
  }
};

}  // namespace u4d
