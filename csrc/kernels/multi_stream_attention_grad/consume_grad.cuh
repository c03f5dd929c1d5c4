// The warpgroups that compute: 64 owned rows each, over all rows that they meet.
#pragma once

#include "kernels/common/warpgroup.h"
#include "kernels/multi_stream_attention/softmax.cuh"
#include "kernels/multi_stream_attention_grad/grad_memory.cuh"

namespace u4d {

constexpr int kClearBarrier = 1;  // one for each consumer; 0 is __syncthreads'

// Where the products find their factors in shared memory.
template <int kDim, Owner kOwner>
struct GradOperands {
  using Memory = GradMemory<kDim, kOwner>;
  // The first of each pair; of what is met, that of stage 0. What is met is K-major where it is compared with what is
  // owned, and MN-major where it is added.
  uint64_t own, compared, added;

  __device__ __forceinline__ GradOperands(const Memory& memory, int consumer)
      : own(hopper::shared_descriptor(memory.own(0) + consumer * kConsumerRows * kRowBytes, 0, kEightRows,
                                      hopper::Swizzle::k128Bytes)),
        compared(hopper::shared_descriptor(memory.met(0, 0), 0, kEightRows, hopper::Swizzle::k128Bytes)),
        added(hopper::shared_descriptor(memory.met(0, 0), Memory::kMetBlock, kEightRows, hopper::Swizzle::k128Bytes)) {}

  // [64, rows that are met] = own met^T, over the channels.
  __device__ __forceinline__ void compare(int which, int stage, float (&scores)[Memory::kRows / 2]) const {
    const uint64_t mine = hopper::advance(own, which * Memory::kOwnBytes);
    const uint64_t other = hopper::advance(compared, (2 * stage + which) * Memory::kMetBytes);
#pragma unroll
    for (int channel = 0; channel < kDim; channel += kStep) {
      const unsigned block = channel / kChannelBlock, bytes = channel % kChannelBlock * 2;
      hopper::wgmma_shared<Memory::kRows>(scores, hopper::advance(mine, block * Memory::kOwnBlock + bytes),
                                          hopper::advance(other, block * Memory::kMetBlock + bytes), channel > 0);
    }
    hopper::wgmma_commit();
  }

  // [64, channels] += weights met, over the rows that are met.
  __device__ __forceinline__ void add_weighted(int which, int stage, const uint32_t (&weights)[Memory::kRows / 4],
                                               float (&results)[kDim / 2]) const {
    const uint64_t other = hopper::advance(added, (2 * stage + which) * Memory::kMetBytes);
#pragma unroll
    for (int step = 0; step < Memory::kRows / kStep; ++step) {
      hopper::wgmma_registers<kDim>(results, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                                    weights[4 * step + 3], hopper::advance(other, step * kStep * kRowBytes), 1);
    }
    hopper::wgmma_commit();
  }
};

// The facts of the queries behind a thread's scores. Where queries are owned, those of the thread's two rows, in
// registers; where they are met, of two neighbouring columns of every eight, in shared memory.
template <int kDim, Owner kOwner>
struct FactsAtHand;

template <int kDim>
struct FactsAtHand<kDim, Owner::kQueries> {
  QueryFacts rows[2];

  __device__ __forceinline__ void own(const GradProblem& problem, const QueryTile& tile, int consumer) {
    const int64_t first = (tile.clip * int64_t(problem.heads) + tile.head) * problem.tokens + tile.first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile_row(consumer, half);
      rows[half] = {0.0f, 0.0f};
      if (row < tile.count) rows[half] = problem.facts[first + row];
    }
  }
  __device__ __forceinline__ void meet(const GradMemory<kDim, Owner::kQueries>&, int) {}
  __device__ __forceinline__ const QueryFacts& operator[](int i) const { return rows[i / 2 % 2]; }
};

template <int kDim>
struct FactsAtHand<kDim, Owner::kKeys> {
  const QueryFacts* columns;

  __device__ __forceinline__ void own(const GradProblem&, const QueryTile&, int) {}
  __device__ __forceinline__ void meet(const GradMemory<kDim, Owner::kKeys>& memory, int stage) {
    columns = memory.facts(stage) + 2 * (threadIdx.x % 4);
  }
  __device__ __forceinline__ const QueryFacts& operator[](int i) const { return columns[i / 4 * 8 + i % 2]; }
};

// Rows that are met and lie past the end of a run are of groups that are not seen. Queries: both factors meet weights
// later, and as zeros they add nothing whatever the weights are. Keys: only the first factor does, and the weights,
// which the second one spoils, are hidden.
template <int kDim, Owner kOwner>
__device__ __forceinline__ void clear_tail(const GradMemory<kDim, kOwner>& memory, int stage, int count, int consumer) {
  using Memory = GradMemory<kDim, kOwner>;
  clear_rows_from<kDim, Memory::kMetBlock>(count, memory.met(stage, 0));
  if (kOwner == Owner::kKeys) clear_rows_from<kDim, Memory::kMetBlock>(count, memory.met(stage, 1));
  hopper::fence_async_shared();
  hopper::named_barrier_sync(kClearBarrier + consumer, hopper::kWarpgroup);
}

template <int kDim>
__device__ __forceinline__ void store_tile(const float (&results)[kDim / 2], float factor, const QueryTile& tile,
                                           int consumer, const GradProblem& problem, uint16_t* out) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile_row(consumer, half);
    if (row < tile.count) store_row<kDim>(results, half, factor, tile, row, problem.tokens, problem.heads, out);
  }
}

// The last product of a tile is still under way while the first ones of the next run, where there are registers for
// that: 128 for the results, of 128 channels and two kinds, leave too few.
template <int kDim, Owner kOwner>
constexpr bool kRunsOn = kOwner == Owner::kQueries || kDim == 64;

template <int kDim, Owner kOwner>
__device__ __forceinline__ void consume(const GradMemory<kDim, kOwner>& memory, const GradProblem& problem) {
  using Memory = GradMemory<kDim, kOwner>;
  constexpr int kRows = Memory::kRows;
  constexpr bool kOwnsKeys = kOwner == Owner::kKeys;
  const int consumer = warpgroup_index() - 1;
  const float log2_scale = kLog2e * problem.scale;
  const GradOperands<kDim, kOwner> operands(memory, consumer);
  FactsAtHand<kDim, kOwner> facts;
  Ring<Memory::kStages> ring;
  unsigned own_parity = 0;
  float grads[kDim / 2], value_grads[kDim / 2];
  float weights[kRows / 2], slopes[kRows / 2];  // slopes: gradients of the weights, then of the scores
  uint32_t packed_weights[kRows / 4] = {}, packed_slopes[kRows / 4] = {};

  QueryTiles tiles(problem.plan, problem.plan_stride, problem.batch, problem.heads);
  for (QueryTile own; tiles.take(&own);) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) grads[i] = value_grads[i] = 0.0f;
    KeyTiles<kRows> met(own.keys);
    if (met.any()) {
      facts.own(problem, own, consumer);
      hopper::barrier_wait(memory.own_full(), own_parity);
      own_parity ^= 1;
    }
    int behind = -1;  // the stage of the tile before
    for (; met.any(); met.advance()) {
      hopper::barrier_wait(memory.met_full(ring.stage), ring.parity);
      // What lies outside the tensor has been read as zeros.
      if (met.count() < kRows && met.end < problem.tokens) clear_tail(memory, ring.stage, met.count(), consumer);
      hopper::wgmma_fence();
      operands.compare(0, ring.stage, weights);
      operands.compare(1, ring.stage, slopes);

      hopper::wgmma_wait<1>();
      hopper::hold_registers(weights);
      hopper::hold_registers(grads);
      hopper::hold_registers(packed_weights);
      hopper::hold_registers(packed_slopes);
      if (behind >= 0) release(memory.met_empty(behind));
      facts.meet(memory, ring.stage);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        weights[i] = hopper::exp2_approx(fmaf(log2_scale, weights[i], -facts[i].lse));
        sum += weights[i];
      }
      if constexpr (kOwnsKeys) {
        pack_weights(weights, packed_weights);
        hopper::wgmma_fence();
        operands.add_weighted(1, ring.stage, packed_weights, value_grads);
      } else {
        hopper::order_after(sum);
      }

      hopper::wgmma_wait<kOwnsKeys ? 1 : 0>();
      hopper::hold_registers(slopes);
      if (met.last()) release(memory.own_empty());
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) slopes[i] = weights[i] * (slopes[i] - facts[i].delta);
      if (!kOwnsKeys && met.count() < kRows) hide_columns_from(met.count(), slopes, 0.0f);
      pack_weights(slopes, packed_slopes);
      hopper::wgmma_fence();
      operands.add_weighted(0, ring.stage, packed_slopes, grads);
      if (kRunsOn<kDim, kOwner>) {
        behind = ring.stage;
      } else {
        hopper::wgmma_wait<0>();
        release(memory.met_empty(ring.stage));
      }
      ring.advance();
    }

    hopper::wgmma_wait<0>();
    hopper::hold_registers(grads);
    hopper::hold_registers(value_grads);
    if (behind >= 0) release(memory.met_empty(behind));
    store_tile<kDim>(grads, problem.scale, own, consumer, problem, problem.grads);
    if (kOwnsKeys) store_tile<kDim>(value_grads, 1.0f, own, consumer, problem, problem.value_grads);
  }
}

}  // namespace u4d
