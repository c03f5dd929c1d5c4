// The attention kernel's shared memory, and the thread that fills it.
#pragma once

#include "kernels/multi_stream_attention/tile_rows.cuh"

namespace u4d {

// Named barriers; 0 is __syncthreads'. One of each for each consumer.
constexpr int kTailBarrier = 1;
constexpr int kTurnBarrier = kTailBarrier + kConsumers;

struct AttentionProblem {
  const int32_t* plan;
  int64_t plan_stride;
  int batch, tokens, heads;
  float scale;  // of the scores, times log2(e)
  uint16_t* out;
  float* lse;
};

// A tile of queries, stages of tiles of keys and of values, and the barriers of all these.
template <int kQueryBytes_, int kKeyBytes_, int kStages_>
struct TileMemory {
  static constexpr int kQueryBytes = kQueryBytes_;
  static constexpr int kKeyBytes = kKeyBytes_;  // of the values, too
  static constexpr int kStages = kStages_;
  static constexpr int kAlignment = 1024;
  static constexpr int kBarriers = 2 + 4 * kStages;
  static constexpr int kBytes = kAlignment + kQueryBytes + 2 * kStages * kKeyBytes + kBarriers * 8;

  unsigned char* base;

  __device__ __forceinline__ explicit TileMemory(unsigned char* dynamic) : base(aligned_shared<kAlignment>(dynamic)) {}

  __device__ __forceinline__ unsigned char* queries() const { return base; }
  __device__ __forceinline__ unsigned char* keys(int stage) const { return base + kQueryBytes + stage * kKeyBytes; }
  __device__ __forceinline__ unsigned char* values(int stage) const { return keys(kStages + stage); }

  // Full: the copy has come. Empty: all warps that compute have read it.
  __device__ __forceinline__ uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(keys(2 * kStages)); }
  __device__ __forceinline__ uint64_t* queries_full() const { return barriers(); }
  __device__ __forceinline__ uint64_t* queries_empty() const { return barriers() + 1; }
  __device__ __forceinline__ uint64_t* keys_full(int stage) const { return barriers() + 2 + stage; }
  __device__ __forceinline__ uint64_t* keys_empty(int stage) const { return keys_full(kStages + stage); }
  __device__ __forceinline__ uint64_t* values_full(int stage) const { return keys_full(2 * kStages + stage); }
  __device__ __forceinline__ uint64_t* values_empty(int stage) const { return keys_full(3 * kStages + stage); }

  // By one thread.
  __device__ __forceinline__ void init_barriers() const {
    hopper::barrier_init(queries_full(), 1);
    hopper::barrier_init(queries_empty(), kConsumerWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::barrier_init(keys_full(stage), 1);
      hopper::barrier_init(values_full(stage), 1);
      hopper::barrier_init(keys_empty(stage), kConsumerWarps);
      hopper::barrier_init(values_empty(stage), kConsumerWarps);
    }
    hopper::fence_barrier_init();
  }
};

// One thread of the block: brings what the others compute with, as far ahead as there is room.
template <class Products>
__device__ __forceinline__ void produce(const typename Products::Memory& memory, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        const AttentionProblem& problem) {
  Ring<Products::Memory::kStages> ring;
  unsigned query_parity = 0;
  QueryTiles tiles(problem.plan, problem.plan_stride, problem.batch, problem.heads);
  for (QueryTile tile; tiles.take(&tile);) {
    typename Products::Keys keys(tile.keys);
    if (!keys.any()) continue;
    hopper::barrier_wait(memory.queries_empty(), query_parity ^ 1);
    Products::load_queries(memory, q_map, tile);
    query_parity ^= 1;
    for (; keys.any(); keys.advance(), ring.advance()) {
      hopper::barrier_wait(memory.keys_empty(ring.stage), ring.parity ^ 1);
      Products::load_keys(memory, ring.stage, k_map, tile, keys.first);
      hopper::barrier_wait(memory.values_empty(ring.stage), ring.parity ^ 1);
      Products::load_values(memory, ring.stage, v_map, tile, keys.first);
    }
  }
}

}  // namespace u4d
