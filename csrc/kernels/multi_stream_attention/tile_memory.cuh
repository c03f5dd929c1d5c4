// The attention kernel's shared memory, and the thread that fills it.
#pragma once

#include "kernels/common/hopper.h"
#include "kernels/multi_stream_attention/plan.cuh"

namespace u4d {

constexpr int kConsumers = 2;  // warpgroups that compute, each for half of the queries of a tile
constexpr int kConsumerRows = kAttentionQueryTile / kConsumers;
constexpr int kKeyTile = 176;      // 88 scores a thread: with 64 results and 44 packed weights just under 240 registers
constexpr int kChannelBlock = 64;  // channels of a 128-byte row of shared memory
constexpr int kRowBytes = 128;

struct AttentionProblem {
  const int32_t* plan;
  int64_t plan_stride;
  int batch, tokens, heads;
  float scale;  // of the scores, times log2(e)
  uint16_t* out;
  float* lse;
};

// Rows of 64 channels, all rows of a tile for the first 64 channels and then for the next; 16-byte pieces permuted.
template <int kDim>
struct TileMemory {
  static constexpr int kStages = kDim == 64 ? 4 : 2;
  static constexpr int kQueryBlock = kAttentionQueryTile * kRowBytes;
  static constexpr int kKeyBlock = kKeyTile * kRowBytes;
  static constexpr int kQueryBytes = kDim / kChannelBlock * kQueryBlock;
  static constexpr int kKeyBytes = kDim / kChannelBlock * kKeyBlock;
  static constexpr int kAlignment = 1024;
  static constexpr int kBarriers = 2 + 4 * kStages;
  static constexpr int kBytes = kAlignment + kQueryBytes + 2 * kStages * kKeyBytes + kBarriers * 8;

  unsigned char* base;

  // The offset and not the pointer is rounded up: the compiler goes on knowing that this is shared memory.
  __device__ __forceinline__ explicit TileMemory(unsigned char* dynamic)
      : base(dynamic + (kAlignment - hopper::shared_address(dynamic) % kAlignment) % kAlignment) {}

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
    constexpr unsigned kWarps = kConsumers * hopper::kWarpgroup / kWarp;
    hopper::barrier_init(queries_full(), 1);
    hopper::barrier_init(queries_empty(), kWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::barrier_init(keys_full(stage), 1);
      hopper::barrier_init(values_full(stage), 1);
      hopper::barrier_init(keys_empty(stage), kWarps);
      hopper::barrier_init(values_empty(stage), kWarps);
    }
    hopper::fence_barrier_init();
  }
};

// A place in the ring of stages; the parity is that of the barriers' phase.
template <int kStages>
struct Ring {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <int kDim>
__device__ __forceinline__ void load_rows(unsigned char* shared, int block_bytes, const CUtensorMap* map,
                                          uint64_t* full, int head, int row, int clip) {
  hopper::barrier_arrive_expect(full, kDim / kChannelBlock * block_bytes);
  for (int block = 0; block < kDim / kChannelBlock; ++block) {
    hopper::tma_load_4d(shared + block * block_bytes, map, full, block * kChannelBlock, head, row, clip);
  }
}

// One thread of the block: brings what the others compute with, as far ahead as there is room.
template <int kDim>
__device__ __forceinline__ void produce(const TileMemory<kDim>& memory, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        const AttentionProblem& problem) {
  using Memory = TileMemory<kDim>;
  Ring<Memory::kStages> ring;
  unsigned query_parity = 0;
  QueryTiles tiles(problem.plan, problem.plan_stride, problem.batch, problem.heads);
  for (QueryTile tile; tiles.take(&tile);) {
    KeyTiles<kKeyTile> keys(tile.keys);
    if (!keys.any()) continue;
    hopper::barrier_wait(memory.queries_empty(), query_parity ^ 1);
    load_rows<kDim>(memory.queries(), Memory::kQueryBlock, q_map, memory.queries_full(), tile.head, tile.first,
                    tile.clip);
    query_parity ^= 1;
    for (; keys.any(); keys.advance(), ring.advance()) {
      hopper::barrier_wait(memory.keys_empty(ring.stage), ring.parity ^ 1);
      load_rows<kDim>(memory.keys(ring.stage), Memory::kKeyBlock, k_map, memory.keys_full(ring.stage), tile.head,
                      keys.first, tile.clip);
      hopper::barrier_wait(memory.values_empty(ring.stage), ring.parity ^ 1);
      load_rows<kDim>(memory.values(ring.stage), Memory::kKeyBlock, v_map, memory.values_full(ring.stage), tile.head,
                      keys.first, tile.clip);
    }
  }
}

}  // namespace u4d
