// Attention's two products from bfloat16: tiles in shared memory, their copies, the instructions on them.
//
// Both factors of Q K^T are rows of 64 channels, 128 bytes: all rows of a tile for the first 64 channels and then for
// the next; 16-byte pieces permuted. The values' rows are the inner dimension of P V.
#pragma once

#include "kernels/multi_stream_attention/softmax.cuh"
#include "kernels/multi_stream_attention/tile_memory.cuh"

namespace u4d {

template <int kDim_>
struct Bfloat16Products {
  static constexpr int kDim = kDim_;
  static constexpr int kKeyTile = 176;  // 88 scores a thread: with 64 results and 44 weights just under 240 registers
  static constexpr int kWeights = kKeyTile / 4;
  static constexpr int kExponent = 0;  // of the largest weight
  static constexpr int kQueryBlock = kAttentionQueryTile * kRowBytes;
  static constexpr int kKeyBlock = kKeyTile * kRowBytes;
  static constexpr int kBlocks = kDim / kChannelBlock;
  using Memory = TileMemory<kBlocks * kQueryBlock, kBlocks * kKeyBlock, kDim == 64 ? 4 : 2>;
  using Keys = KeyTiles<kKeyTile>;
  using Problem = AttentionProblem;
  using Sum = SumInCores<kDim / 2>;

  const Problem& problem;
  int consumer;
  uint64_t queries, keys, values;  // keys and values of stage 0
  float scale[2];                  // of the scores of this thread's rows, times log2(e)

  static __device__ __forceinline__ void load_queries(const Memory& memory, const CUtensorMap* map,
                                                      const QueryTile& tile) {
    load_rows<kDim>(memory.queries(), kQueryBlock, map, memory.queries_full(), tile.head, tile.first, tile.clip);
  }
  static __device__ __forceinline__ void load_keys(const Memory& memory, int stage, const CUtensorMap* map,
                                                   const QueryTile& tile, int first) {
    load_rows<kDim>(memory.keys(stage), kKeyBlock, map, memory.keys_full(stage), tile.head, first, tile.clip);
  }
  static __device__ __forceinline__ void load_values(const Memory& memory, int stage, const CUtensorMap* map,
                                                     const QueryTile& tile, int first) {
    load_rows<kDim>(memory.values(stage), kKeyBlock, map, memory.values_full(stage), tile.head, first, tile.clip);
  }

  __device__ __forceinline__ Bfloat16Products(const Memory& memory, const Problem& problem_, int consumer_)
      : problem(problem_),
        consumer(consumer_),
        queries(hopper::shared_descriptor(memory.queries() + consumer * kConsumerRows * kRowBytes, 0, kEightRows,
                                          hopper::Swizzle::k128Bytes)),
        keys(hopper::shared_descriptor(memory.keys(0), 0, kEightRows, hopper::Swizzle::k128Bytes)),
        values(hopper::shared_descriptor(memory.values(0), kKeyBlock, kEightRows, hopper::Swizzle::k128Bytes)),
        scale{problem_.scale, problem_.scale} {}

  __device__ __forceinline__ void begin(const QueryTile&) {}
  __device__ __forceinline__ float value_scale(const QueryTile&) const { return 1.0f; }

  __device__ __forceinline__ void multiply_keys(int stage, float (&scores)[kKeyTile / 2]) const {
    const uint64_t stage_keys = hopper::advance(keys, stage * Memory::kKeyBytes);
#pragma unroll
    for (int channel = 0; channel < kDim; channel += kStep) {
      const unsigned block = channel / kChannelBlock, bytes = channel % kChannelBlock * 2;
      hopper::wgmma_shared<kKeyTile>(scores, hopper::advance(queries, block * kQueryBlock + bytes),
                                     hopper::advance(stage_keys, block * kKeyBlock + bytes), channel > 0);
    }
    hopper::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(int stage, const uint32_t (&weights)[kWeights],
                                                  float (&results)[kDim / 2]) const {
    const uint64_t stage_values = hopper::advance(values, stage * Memory::kKeyBytes);
#pragma unroll
    for (int step = 0; step < kKeyTile / kStep; ++step) {
      hopper::wgmma_registers<kDim>(results, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                                    weights[4 * step + 3], hopper::advance(stage_values, step * kStep * kRowBytes), 1);
    }
    hopper::wgmma_commit();
  }

  static __device__ __forceinline__ void pack(const float (&scores)[kKeyTile / 2], uint32_t (&weights)[kWeights]) {
    pack_weights(scores, weights);
  }

  // The values, without what must not be multiplied with a weight of 0.
  __device__ __forceinline__ void await_values(const Memory& memory, const Ring<Memory::kStages>& at, const QueryTile&,
                                               const Keys& keys_of_tile) const {
    hopper::barrier_wait(memory.values_full(at.stage), at.parity);
    // What lies outside the tensor has been read as zeros.
    if (keys_of_tile.count() == kKeyTile || keys_of_tile.end == problem.tokens) return;
    clear_rows_from<kDim, kKeyBlock>(keys_of_tile.count(), memory.values(at.stage));
    hopper::fence_async_shared();
    hopper::named_barrier_sync(kTailBarrier + consumer, hopper::kWarpgroup);
  }
};

}  // namespace u4d
