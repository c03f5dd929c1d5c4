// q, k and v as e4m3: the head's extents, its scales, then the values.
#pragma once

#include "kernels/common/e4m3.h"
#include "kernels/common/half_types.h"
#include "kernels/common/hopper.h"
#include "kernels/common/launch.h"
#include "kernels/multi_stream_attention/plan.cuh"
#include "kernels/multi_stream_attention/tile_rows.cuh"
#include "kernels/multi_stream_attention_fp8/e4m3_products.cuh"

namespace u4d {
namespace {

constexpr int kQuantizeThreads = 256;

// Of k and of v: the bits of the largest finite magnitude. 1 where a v is not finite.
struct Extents {
  uint32_t key, value, value_not_finite;
};

__device__ __forceinline__ Extents larger(const Extents& a, const Extents& b) {
  return {max(a.key, b.key), max(a.value, b.value), max(a.value_not_finite, b.value_not_finite)};
}

__device__ __forceinline__ Extents largest_of_warp(Extents mine) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const Extents other{__shfl_xor_sync(0xffffffffu, mine.key, lanes), __shfl_xor_sync(0xffffffffu, mine.value, lanes),
                        __shfl_xor_sync(0xffffffffu, mine.value_not_finite, lanes)};
    mine = larger(mine, other);
  }
  return mine;
}

struct Rows {
  const Bfloat16* data;
  Strides strides;
};

struct QuantizeProblem {
  int tokens, heads, group_size;
  int slices;      // of a head's tokens
  int64_t padded;  // tokens of a row of v_values
  GroupMask seen;  // by anybody: [batch, groups], or null
  Rows q, k, v;
  Extents* extents;
  HeadScales* head_scales;
  E4m3* q_values;
  float* q_scale;
  E4m3* k_values;
  E4m3* v_values;
};

// Which key groups anybody sees. A thread for each group, a row of blocks for each clip.
__global__ __launch_bounds__(kQuantizeThreads) void seen_kernel(GroupMask mask, int groups, uint8_t* seen) {
  const int key = static_cast<int>(blockIdx.x * kQuantizeThreads + threadIdx.x);
  if (key >= groups) return;
  const uint8_t* column = mask.seen + blockIdx.y * mask.clip_stride + key * mask.key_stride;
  bool any = false;
  for (int query = 0; query < groups && !any; ++query) any = column[query * mask.query_stride] != 0;
  seen[int64_t(blockIdx.y) * groups + key] = any;
}

// The tokens of one head that a block works on.
struct Slice {
  int clip, head, number, first;
  int64_t of_head;  // counts the heads of all clips

  __device__ __forceinline__ explicit Slice(const QuantizeProblem& problem)
      : number(static_cast<int>(blockIdx.x % problem.slices)), of_head(blockIdx.x / problem.slices) {
    first = number * kAttentionSlice;
    clip = static_cast<int>(of_head / problem.heads);
    head = static_cast<int>(of_head % problem.heads);
  }
};

__device__ __forceinline__ const Bfloat16* row_of(const Rows& rows, const Slice& slice, int token) {
  return rows.data + slice.clip * rows.strides.clip + token * rows.strides.token + slice.head * rows.strides.head;
}

__device__ __forceinline__ bool is_seen(const QuantizeProblem& problem, const Slice& slice, int token) {
  if (token >= problem.tokens) return false;
  const GroupMask& seen = problem.seen;
  return !seen.seen || seen.seen[slice.clip * seen.clip_stride + token / problem.group_size * seen.key_stride] != 0;
}

constexpr uint32_t kInfinity = 0x7f800000u;

// A block for each slice.
template <int kDim>
__global__ __launch_bounds__(kQuantizeThreads) void extents_kernel(const __grid_constant__ QuantizeProblem problem) {
  constexpr int kSize = Vector<Bfloat16>::kSize, kPieces = kDim / kSize;
  __shared__ Extents of_warp[kQuantizeThreads / kWarp];
  const Slice slice(problem);
  Extents extents{0, 0, 0};
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kAttentionSlice * kPieces; i += kQuantizeThreads) {
    const int token = slice.first + i / kPieces, channel = i % kPieces * kSize;
    if (!is_seen(problem, slice, token)) continue;
    const Vector<Bfloat16> key = load_vector(row_of(problem.k, slice, token) + channel);
    const Vector<Bfloat16> value = load_vector(row_of(problem.v, slice, token) + channel);
#pragma unroll
    for (int c = 0; c < kSize; ++c) {
      const uint32_t key_bits = magnitude_bits(to_float(key.values[c]));
      const uint32_t value_bits = magnitude_bits(to_float(value.values[c]));
      if (key_bits < kInfinity) extents.key = max(extents.key, key_bits);
      if (value_bits < kInfinity) extents.value = max(extents.value, value_bits);
      if (value_bits >= kInfinity) extents.value_not_finite = 1;
    }
  }
  extents = largest_of_warp(extents);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = extents;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const Extents& other : of_warp) extents = larger(extents, other);
  problem.extents[blockIdx.x] = extents;
}

// A warp for each head of each clip.
__global__ __launch_bounds__(kWarp) void head_scales_kernel(const Extents* extents, int slices,
                                                            HeadScales* head_scales) {
  Extents mine{0, 0, 0};
  for (int slice = static_cast<int>(threadIdx.x); slice < slices; slice += kWarp) {
    mine = larger(mine, extents[int64_t(blockIdx.x) * slices + slice]);
  }
  mine = largest_of_warp(mine);
  if (threadIdx.x != 0) return;
  head_scales[blockIdx.x] = {scale_of_row(mine.key), scale_of_row(mine.value), mine.value_not_finite ? 1.0f : 0.0f};
}

// What a thread quantises at a time: 32 bytes to 16.
constexpr int kPart = 16;

struct Part {
  float values[kPart];
};

struct alignas(16) PartValues {
  uint32_t words[kPart / 4];
};

__device__ __forceinline__ Part load_part(const Bfloat16* from) {
  constexpr int kSize = Vector<Bfloat16>::kSize;
  const Vector<Bfloat16> loaded[] = {load_vector(from), load_vector(from + kSize)};
  Part part;
#pragma unroll
  for (int i = 0; i < kPart; ++i) part.values[i] = to_float(loaded[i / kSize].values[i % kSize]);
  return part;
}

// x times a factor; infinity becomes NaN, since 0 * infinity is.
__device__ __forceinline__ float times(float x, float factor) { return fmaf(x, factor, 0.0f * x); }

__device__ __forceinline__ PartValues quantize(const Part& part, float factor) {
  PartValues quantized;
#pragma unroll
  for (int i = 0; i < kPart / 4; ++i) {
    const float* x = part.values + 4 * i;
    quantized.words[i] =
        hopper::pack_e4m3(times(x[0], factor), times(x[1], factor), times(x[2], factor), times(x[3], factor));
  }
  return quantized;
}

// Calls work(token in the slice, first channel) for this thread's parts of rows: neighbours have neighbouring parts,
// and all threads take as many turns.
template <int kDim, class Work>
__device__ __forceinline__ void for_each_part(const Work& work) {
  constexpr int kParts = kDim / kPart;
#pragma unroll
  for (int turn = 0; turn < kAttentionSlice * kParts / kQuantizeThreads; ++turn) {
    const int i = turn * kQuantizeThreads + static_cast<int>(threadIdx.x);
    work(i / kParts, i % kParts * kPart);
  }
}

template <int kDim>
__device__ __forceinline__ void quantize_queries(const QuantizeProblem& problem, const Slice& slice) {
  for_each_part<kDim>([&](int row, int channel) {
    const int token = slice.first + row;
    const bool inside = token < problem.tokens;
    const Part part = inside ? load_part(row_of(problem.q, slice, token) + channel) : Part{};
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kPart; ++i) largest = max(largest, magnitude_bits(part.values[i]));
#pragma unroll
    for (int lanes = kDim / kPart / 2; lanes > 0; lanes /= 2) {
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    if (!inside) return;
    const float scale = scale_of_row(largest);
    const int64_t at = (slice.clip * int64_t(problem.tokens) + token) * problem.heads + slice.head;
    *reinterpret_cast<PartValues*>(problem.q_values + at * kDim + channel) = quantize(part, 1.0f / scale);
    if (channel == 0) problem.q_scale[slice.of_head * problem.tokens + token] = scale;
  });
}

template <int kDim>
__device__ __forceinline__ void quantize_keys(const QuantizeProblem& problem, const Slice& slice, float factor) {
  for_each_part<kDim>([&](int row, int channel) {
    const int token = slice.first + row;
    if (token >= problem.tokens) return;
    const bool seen = is_seen(problem, slice, token);
    const Part part = seen ? load_part(row_of(problem.k, slice, token) + channel) : Part{};
    const int64_t at = (slice.clip * int64_t(problem.tokens) + token) * problem.heads + slice.head;
    *reinterpret_cast<PartValues*>(problem.k_values + at * kDim + channel) = quantize(part, factor);
  });
}

// A slice of values while it is turned around: rows of channels, and 16 bytes more after each 16 rows, so that the
// threads that read one channel of all sixteens meet different banks.
template <int kDim>
struct TurnedSlice {
  static constexpr int kBytes = kAttentionSlice * kDim + kAttentionSlice;
  static __device__ __forceinline__ int place(int row, int channel) { return row * kDim + row / 16 * 16 + channel; }
};

template <int kDim>
__device__ __forceinline__ void quantize_values(const QuantizeProblem& problem, const Slice& slice, float factor,
                                                unsigned char* turned) {
  using Turned = TurnedSlice<kDim>;
  for_each_part<kDim>([&](int row, int channel) {
    const int token = slice.first + row;
    const bool seen = is_seen(problem, slice, token);
    const Part part = seen ? load_part(row_of(problem.v, slice, token) + channel) : Part{};
    *reinterpret_cast<PartValues*>(turned + Turned::place(row, channel)) = quantize(part, factor);
  });
  __syncthreads();
  // Eight threads write 128 neighbouring keys of a channel.
  constexpr int kSixteens = kAttentionSlice / 16, kChannels = kQuantizeThreads / kSixteens;
  const int sixteen = static_cast<int>(threadIdx.x) % kSixteens, first = slice.first + 16 * sixteen;
  if (first >= problem.padded) return;
#pragma unroll
  for (int channel = static_cast<int>(threadIdx.x) / kSixteens; channel < kDim; channel += kChannels) {
    PartValues column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      column.words[i] = 0;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const int row = 16 * sixteen + attention_key_at(4 * i + byte);
        column.words[i] |= static_cast<uint32_t>(turned[Turned::place(row, channel)]) << 8 * byte;
      }
    }
    *reinterpret_cast<PartValues*>(problem.v_values + (slice.of_head * kDim + channel) * problem.padded + first) =
        column;
  }
}

// A block for each slice.
template <int kDim>
__global__ __launch_bounds__(kQuantizeThreads) void quantize_kernel(const __grid_constant__ QuantizeProblem problem) {
  __shared__ __align__(16) unsigned char turned[TurnedSlice<kDim>::kBytes];
  const Slice slice(problem);
  const HeadScales scales = problem.head_scales[slice.of_head];
  quantize_values<kDim>(problem, slice, 1.0f / scales.value, turned);
  quantize_keys<kDim>(problem, slice, 1.0f / scales.key);
  quantize_queries<kDim>(problem, slice);
}

}  // namespace
}  // namespace u4d
