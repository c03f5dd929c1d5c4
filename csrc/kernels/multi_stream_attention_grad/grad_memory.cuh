// Shared memory of the two kernels of the gradient, and the threads that fill it.
//
// A block owns a tile of rows and meets tiles of other rows, those that see them or that they see. The block that owns
// keys has tiles of k and v, and meets tiles of q and grad; the one that owns queries has q and grad, and meets k and
// v. Of each pair the first factors make the scores, the second ones the gradients of the weights.
#pragma once

#include "kernels/multi_stream_attention_grad/query_facts.cuh"

namespace u4d {

enum class Owner { kKeys, kQueries };

// Rows of a tile that is met. A thread has half as many scores, as many gradients of weights, a quarter as many packed
// pairs (twice where it owns keys), and half a result for each channel (a whole one where it owns keys): at most 224 of
// its 240 registers.
template <int kDim, Owner kOwner>
constexpr int kMetRows = kOwner == Owner::kKeys ? (kDim == 64 ? 96 : 64) : (kDim == 64 ? 128 : 96);

struct GradProblem {
  const int32_t* plan;  // of what is owned: a mask's transpose for keys
  int64_t plan_stride;
  int batch, tokens, heads;
  float scale;              // of the scores
  const QueryFacts* facts;  // [batch, heads, tokens]
  uint16_t* grads;          // of the first factor that is owned
  uint16_t* value_grads;    // of v, where keys are owned
};

struct GradMaps {
  CUtensorMap own[2], met[2];
};

template <int kDim, Owner kOwner>
struct GradMemory {
  static constexpr int kRows = kMetRows<kDim, kOwner>;
  static constexpr int kStages = kOwner == Owner::kQueries && kDim == 128 ? 3 : 4;
  static constexpr int kOwnBlock = kAttentionQueryTile * kRowBytes;
  static constexpr int kMetBlock = kRows * kRowBytes;
  static constexpr int kOwnBytes = kDim / kChannelBlock * kOwnBlock;
  static constexpr int kMetBytes = kDim / kChannelBlock * kMetBlock;
  static constexpr int kFactBytes = kOwner == Owner::kKeys ? kRows * 8 : 0;
  static constexpr int kAlignment = 1024;
  static constexpr int kBarriers = 2 + 2 * kStages;
  static constexpr int kBytes = kAlignment + 2 * kOwnBytes + kStages * (2 * kMetBytes + kFactBytes) + kBarriers * 8;

  unsigned char* base;

  __device__ __forceinline__ explicit GradMemory(unsigned char* dynamic) : base(aligned_shared<kAlignment>(dynamic)) {}

  __device__ __forceinline__ unsigned char* own(int which) const { return base + which * kOwnBytes; }
  __device__ __forceinline__ unsigned char* met(int stage, int which) const {
    return base + 2 * kOwnBytes + (2 * stage + which) * kMetBytes;
  }

  __device__ __forceinline__ QueryFacts* facts(int stage) const {
    return reinterpret_cast<QueryFacts*>(met(kStages, 0) + stage * kFactBytes);
  }

  // Full: both tiles (and the numbers) have come. Empty: all warps that compute have read them.
  __device__ __forceinline__ uint64_t* own_full() const { return reinterpret_cast<uint64_t*>(facts(kStages)); }
  __device__ __forceinline__ uint64_t* own_empty() const { return own_full() + 1; }
  __device__ __forceinline__ uint64_t* met_full(int stage) const { return own_full() + 2 + stage; }
  __device__ __forceinline__ uint64_t* met_empty(int stage) const { return met_full(kStages + stage); }

  // By one thread.
  __device__ __forceinline__ void init_barriers() const {
    hopper::barrier_init(own_full(), 2);
    hopper::barrier_init(own_empty(), kConsumerWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::barrier_init(met_full(stage), kOwner == Owner::kKeys ? 2 + kRows : 2);
      hopper::barrier_init(met_empty(stage), kConsumerWarps);
    }
    hopper::fence_barrier_init();
  }
};

// One thread of the block: brings tiles, as far ahead as there is room.
template <int kDim, Owner kOwner>
__device__ __forceinline__ void bring_tiles(const GradMemory<kDim, kOwner>& memory, const GradMaps& maps,
                                            const GradProblem& problem) {
  using Memory = GradMemory<kDim, kOwner>;
  Ring<Memory::kStages> ring;
  unsigned own_parity = 0;
  QueryTiles tiles(problem.plan, problem.plan_stride, problem.batch, problem.heads);
  for (QueryTile own; tiles.take(&own);) {
    KeyTiles<Memory::kRows> met(own.keys);
    if (!met.any()) continue;
    hopper::barrier_wait(memory.own_empty(), own_parity ^ 1);
    for (int i = 0; i < 2; ++i) {
      load_rows<kDim>(memory.own(i), Memory::kOwnBlock, &maps.own[i], memory.own_full(), own.head, own.first, own.clip);
    }
    own_parity ^= 1;
    for (; met.any(); met.advance(), ring.advance()) {
      hopper::barrier_wait(memory.met_empty(ring.stage), ring.parity ^ 1);
      for (int i = 0; i < 2; ++i) {
        load_rows<kDim>(memory.met(ring.stage, i), Memory::kMetBlock, &maps.met[i], memory.met_full(ring.stage),
                        own.head, met.first, own.clip);
      }
    }
  }
}

// Of the block that owns keys, a thread for each query that is met: brings what is to be known of it. Of queries past
// the end of a run, which are cleared, that is 0.
template <int kDim>
__device__ __forceinline__ void bring_facts(const GradMemory<kDim, Owner::kKeys>& memory, const GradProblem& problem,
                                            int query) {
  using Memory = GradMemory<kDim, Owner::kKeys>;
  Ring<Memory::kStages> ring;
  QueryTiles tiles(problem.plan, problem.plan_stride, problem.batch, problem.heads);
  for (QueryTile own; tiles.take(&own);) {
    const int first = (own.clip * problem.heads + own.head) * problem.tokens + query;
    for (KeyTiles<Memory::kRows> met(own.keys); met.any(); met.advance(), ring.advance()) {
      QueryFacts mine{0.0f, 0.0f};
      if (query < met.count()) mine = problem.facts[first + met.first];
      hopper::barrier_wait(memory.met_empty(ring.stage), ring.parity ^ 1);
      memory.facts(ring.stage)[query] = mine;
      hopper::barrier_arrive(memory.met_full(ring.stage));
    }
  }
}

}  // namespace u4d
