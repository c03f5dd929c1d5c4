// Attention's two products from e4m3: tiles in shared memory, their copies, the instructions on them.
//
// The inner dimension of 8-bit products must be the contiguous one of both factors. Queries and keys are rows of all
// channels, values are rows of the tile's keys, one for each channel; in rows of 128 and of 64 bytes 16-byte pieces are
// permuted.
//
// While they add up e4m3 products, the tensor cores keep about 14 bits: a product is cut off where it ends below 2^-13
// of the sum. A weight among thousands would be lost whole, so each tile's products begin at zero and are added in
// float32.
#pragma once

#include "kernels/multi_stream_attention/softmax.cuh"
#include "kernels/multi_stream_attention/tile_memory.cuh"
#include "kernels/multi_stream_attention_fp8/multi_stream_attention_fp8.h"

namespace u4d {

struct HeadScales {
  float key, value;
  float value_not_finite;  // 0: all are finite
};

struct E4m3Problem : AttentionProblem {
  const float* q_scale;
  const HeadScales* head_scales;
};

template <int kDim_>
struct E4m3Products {
  static constexpr int kDim = kDim_;
  static constexpr int kKeyTile = 128;  // 64 scores a thread: with 64 results, 64 products and 16 weights below 240
  static constexpr int kWeights = kKeyTile / 8;
  static constexpr int kExponent = 8;  // of the largest weight
  static constexpr int kInner = 32;    // of the inner dimension, one instruction
  using Memory = TileMemory<kAttentionQueryTile * kDim, kKeyTile * kDim, 6>;
  using Keys = KeyTiles<kKeyTile, 16>;
  using Problem = E4m3Problem;
  using Sum = SumOfTiles<kDim / 2>;

  const Problem& problem;
  int consumer;
  uint64_t queries, keys, values;  // keys and values of stage 0
  float scale[2];                  // of the scores of this thread's rows, times log2(e)

  static __device__ __forceinline__ void load_queries(const Memory& memory, const CUtensorMap* map,
                                                      const QueryTile& tile) {
    hopper::barrier_arrive_expect(memory.queries_full(), Memory::kQueryBytes);
    hopper::tma_load_4d(memory.queries(), map, memory.queries_full(), 0, tile.head, tile.first, tile.clip);
  }
  static __device__ __forceinline__ void load_keys(const Memory& memory, int stage, const CUtensorMap* map,
                                                   const QueryTile& tile, int first) {
    hopper::barrier_arrive_expect(memory.keys_full(stage), Memory::kKeyBytes);
    hopper::tma_load_4d(memory.keys(stage), map, memory.keys_full(stage), 0, tile.head, first, tile.clip);
  }
  static __device__ __forceinline__ void load_values(const Memory& memory, int stage, const CUtensorMap* map,
                                                     const QueryTile& tile, int first) {
    hopper::barrier_arrive_expect(memory.values_full(stage), Memory::kKeyBytes);
    hopper::tma_load_4d(memory.values(stage), map, memory.values_full(stage), first, 0, tile.head, tile.clip);
  }

  // A row of `bytes` is the whole span of the permutation.
  static __device__ __forceinline__ uint64_t descriptor(const unsigned char* shared, int bytes) {
    return hopper::shared_descriptor(shared, 0, 8 * bytes,
                                     bytes == 64 ? hopper::Swizzle::k64Bytes : hopper::Swizzle::k128Bytes);
  }

  __device__ __forceinline__ E4m3Products(const Memory& memory, const Problem& problem_, int consumer_)
      : problem(problem_),
        consumer(consumer_),
        queries(descriptor(memory.queries() + consumer * kConsumerRows * kDim, kDim)),
        keys(descriptor(memory.keys(0), kDim)),
        values(descriptor(memory.values(0), kKeyTile)) {}

  __device__ __forceinline__ void begin(const QueryTile& tile) {
    const int64_t head = number_of_head(tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows that are not the tile's give results that nobody stores.
      const int token = tile.first + tile_row(consumer, half);
      const float row_scale = token < problem.tokens ? problem.q_scale[head * problem.tokens + token] : 1.0f;
      const float product = problem.scale * problem.head_scales[head].key * row_scale;
      // Never 0, which a product of small scales may be: hidden scores are -inf, and 0 * inf is NaN.
      scale[half] = product < kSmallestScale ? kSmallestScale : product;
    }
  }

  __device__ __forceinline__ float value_scale(const QueryTile& tile) const {
    return problem.head_scales[number_of_head(tile)].value;
  }

  __device__ __forceinline__ int64_t number_of_head(const QueryTile& tile) const {
    return tile.clip * int64_t(problem.heads) + tile.head;
  }

  __device__ __forceinline__ void multiply_keys(int stage, float (&scores)[kKeyTile / 2]) const {
    const uint64_t stage_keys = hopper::advance(keys, stage * Memory::kKeyBytes);
#pragma unroll
    for (int channel = 0; channel < kDim; channel += kInner) {
      hopper::wgmma_shared_e4m3<kKeyTile>(scores, hopper::advance(queries, channel),
                                          hopper::advance(stage_keys, channel), channel > 0);
    }
    hopper::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(int stage, const uint32_t (&weights)[kWeights],
                                                  float (&products)[kDim / 2]) const {
    const uint64_t stage_values = hopper::advance(values, stage * Memory::kKeyBytes);
#pragma unroll
    for (int step = 0; step < kKeyTile / kInner; ++step) {
      hopper::wgmma_registers_e4m3<kDim>(products, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                                         weights[4 * step + 3], hopper::advance(stage_values, step * kInner), step > 0);
    }
    hopper::wgmma_commit();
  }

  // Of each 16 columns a thread has four in either row, which the values' order puts side by side: attention_key_at().
  static __device__ __forceinline__ void pack(const float (&scores)[kKeyTile / 2], uint32_t (&weights)[kWeights]) {
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const int at = 8 * (i / 2) + 2 * (i % 2);
      weights[i] = hopper::pack_e4m3(scores[at], scores[at + 1], scores[at + 4], scores[at + 5]);
    }
  }

  // The values, without what must not be multiplied with a weight of 0.
  __device__ __forceinline__ void await_values(const Memory& memory, const Ring<Memory::kStages>& at,
                                               const QueryTile& tile, const Keys& keys_of_tile) const {
    hopper::barrier_wait(memory.values_full(at.stage), at.parity);
    if (keys_of_tile.count() == kKeyTile && keys_of_tile.before() == 0) return;
    if (problem.head_scales[number_of_head(tile)].value_not_finite == 0.0f) return;
    clear_others(keys_of_tile, memory.values(at.stage));
    hopper::fence_async_shared();
    hopper::named_barrier_sync(kTailBarrier + consumer, hopper::kWarpgroup);
  }

  // Values of keys that belong to others. Their weight is 0, but 0 * NaN is NaN. Each consumer clears all of them for
  // itself; both write the same zeros. Byte by byte, since data with NaN is not worth more.
  static __device__ __forceinline__ void clear_others(const Keys& tile, unsigned char* tile_values) {
    for (int i = static_cast<int>(threadIdx.x) % hopper::kWarpgroup; i < kDim * kKeyTile; i += hopper::kWarpgroup) {
      const int channel = i / kKeyTile, key = i % kKeyTile;
      if (key >= tile.before() && key < tile.count()) continue;
      const int at = channel * kKeyTile + key / 16 * 16 + attention_place_of(key % 16);
      tile_values[at ^ ((channel % 8) << 4)] = 0;  // Swizzle::k128Bytes
    }
  }
};

}  // namespace u4d
