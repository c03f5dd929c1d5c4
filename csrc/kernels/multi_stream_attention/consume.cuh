// The warpgroups that compute: 64 queries each, over all keys that the tile sees.
#pragma once

#include "kernels/multi_stream_attention/softmax.cuh"
#include "kernels/multi_stream_attention/tile_memory.cuh"

namespace u4d {

// While one consumer's products run, the other's exponentials do: they take turns in issuing products.
constexpr bool kTakeTurns = true;

// 0 is __syncthreads'; one of each for each consumer.
constexpr int kTailBarrier = 1;
constexpr int kTurnBarrier = kTailBarrier + kConsumers;

constexpr unsigned kEightRows = 8 * kRowBytes;
constexpr int kStep = 16;  // of the inner dimension, one instruction

// Where the products find their factors in shared memory.
template <int kDim>
struct Operands {
  using Memory = TileMemory<kDim>;
  uint64_t queries, keys, values;  // keys and values of stage 0

  __device__ __forceinline__ Operands(const Memory& memory, int consumer)
      : queries(hopper::shared_descriptor(memory.queries() + consumer * kConsumerRows * kRowBytes, 0, kEightRows,
                                          hopper::Swizzle::k128Bytes)),
        keys(hopper::shared_descriptor(memory.keys(0), 0, kEightRows, hopper::Swizzle::k128Bytes)),
        values(hopper::shared_descriptor(memory.values(0), Memory::kKeyBlock, kEightRows, hopper::Swizzle::k128Bytes)) {
  }

  __device__ __forceinline__ void multiply_keys(int stage, float (&scores)[kKeyTile / 2]) const {
    const uint64_t stage_keys = hopper::advance(keys, stage * Memory::kKeyBytes);
#pragma unroll
    for (int channel = 0; channel < kDim; channel += kStep) {
      const unsigned block = channel / kChannelBlock, bytes = channel % kChannelBlock * 2;
      hopper::wgmma_shared<kKeyTile>(scores, hopper::advance(queries, block * Memory::kQueryBlock + bytes),
                                     hopper::advance(stage_keys, block * Memory::kKeyBlock + bytes), channel > 0);
    }
    hopper::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(int stage, const uint32_t (&weights)[kKeyTile / 4],
                                                  float (&results)[kDim / 2]) const {
    const uint64_t stage_values = hopper::advance(values, stage * Memory::kKeyBytes);
#pragma unroll
    for (int step = 0; step < kKeyTile / kStep; ++step) {
      hopper::wgmma_registers<kDim>(results, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                                    weights[4 * step + 3], hopper::advance(stage_values, step * kStep * kRowBytes), 1);
    }
    hopper::wgmma_commit();
  }
};

// One arrival for each warp.
__device__ __forceinline__ void release(uint64_t* empty) {
  if (threadIdx.x % kWarp == 0) hopper::barrier_arrive(empty);
}

// Values after the last key of a run belong to groups that are not seen. Their weight is 0, but 0 * NaN is NaN. Each
// consumer clears all of them for itself; both write the same zeros.
template <int kDim>
__device__ __forceinline__ void clear_values_from(int count, unsigned char* values, int consumer) {
  constexpr int kBlock = TileMemory<kDim>::kKeyBlock;
  const int thread = static_cast<int>(threadIdx.x) % hopper::kWarpgroup;
  for (int block = 0; block < kDim / kChannelBlock; ++block) {
    for (int byte = count * kRowBytes + 8 * thread; byte < kBlock; byte += 8 * hopper::kWarpgroup) {
      *reinterpret_cast<uint64_t*>(values + block * kBlock + byte) = 0;
    }
  }
  hopper::fence_async_shared();
  hopper::named_barrier_sync(kTailBarrier + consumer, hopper::kWarpgroup);
}

template <int kDim>
__device__ __forceinline__ void await_values(const TileMemory<kDim>& memory, const Ring<TileMemory<kDim>::kStages>& at,
                                             const KeyTiles<kKeyTile>& keys, int tokens, int consumer) {
  hopper::barrier_wait(memory.values_full(at.stage), at.parity);
  // What lies outside the tensor has been read as zeros.
  if (keys.count() < kKeyTile && keys.end < tokens) {
    clear_values_from<kDim>(keys.count(), memory.values(at.stage), consumer);
  }
}

// The results of this thread's two rows.
template <int kDim>
__device__ __forceinline__ void store(const float (&results)[kDim / 2], const float (&factor)[2], const float (&lse)[2],
                                      const QueryTile& tile, int consumer, const AttentionProblem& problem) {
  const int thread = static_cast<int>(threadIdx.x) % hopper::kWarpgroup;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = consumer * kConsumerRows + thread / kWarp * 16 + thread % kWarp / 4 + 8 * half;
    if (row >= tile.count) continue;
    const int64_t token = tile.first + row;
    uint16_t* out = problem.out + ((tile.clip * int64_t(problem.tokens) + token) * problem.heads + tile.head) * kDim;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const int at = 4 * i + 2 * half;
      *reinterpret_cast<uint32_t*>(out + 8 * i + 2 * (thread % 4)) =
          hopper::pack_bf16(results[at] * factor[half], results[at + 1] * factor[half]);
    }
    if (thread % 4 == 0) {
      problem.lse[(tile.clip * int64_t(problem.heads) + tile.head) * problem.tokens + token] = lse[half];
    }
  }
}

// The scores of the next keys are under way while the weights of these meet their values; the exponentials of the next
// overlap with that.
template <int kDim>
__device__ __forceinline__ void consume(const TileMemory<kDim>& memory, const AttentionProblem& problem) {
  using Memory = TileMemory<kDim>;
  const int consumer = static_cast<int>(threadIdx.x) / hopper::kWarpgroup - 1;
  const Operands<kDim> operands(memory, consumer);
  Ring<Memory::kStages> ring;
  unsigned query_parity = 0;
  float results[kDim / 2], scores[kKeyTile / 2], shrink[2];
  uint32_t weights[kKeyTile / 4];

  if (kTakeTurns && consumer == 1) hopper::named_barrier_arrive(kTurnBarrier, kConsumers * hopper::kWarpgroup);
  QueryTiles tiles(problem.plan, problem.plan_stride, problem.batch, problem.heads);
  for (QueryTile tile; tiles.take(&tile);) {
    KeyTiles<kKeyTile> keys(tile.keys);
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) results[i] = 0.0f;
    if (!keys.any()) {
      store<kDim>(results, {1.0f, 1.0f}, {-INFINITY, -INFINITY}, tile, consumer, problem);
      continue;
    }
    RowState state = empty_rows();
    hopper::barrier_wait(memory.queries_full(), query_parity);
    query_parity ^= 1;

    hopper::barrier_wait(memory.keys_full(ring.stage), ring.parity);
    hopper::wgmma_fence();
    operands.multiply_keys(ring.stage, scores);
    hopper::wgmma_wait<0>();
    hopper::hold_registers(scores);
    release(memory.keys_empty(ring.stage));
    if (keys.last()) release(memory.queries_empty());
    if (keys.count() < kKeyTile) hide_columns_from(keys.count(), scores);
    to_weights(problem.scale, scores, state, shrink);
    pack_weights(scores, weights);

    while (!keys.last()) {
      await_values<kDim>(memory, ring, keys, problem.tokens, consumer);
      const Ring<Memory::kStages> behind = ring;
      ring.advance();
      keys.advance();
      hopper::barrier_wait(memory.keys_full(ring.stage), ring.parity);

      if (kTakeTurns) hopper::named_barrier_sync(kTurnBarrier + consumer, kConsumers * hopper::kWarpgroup);
      hopper::hold_registers(results);
      hopper::hold_registers(weights);
      hopper::wgmma_fence();
      operands.multiply_keys(ring.stage, scores);
      operands.multiply_values(behind.stage, weights, results);
      if (kTakeTurns) hopper::named_barrier_arrive(kTurnBarrier + 1 - consumer, kConsumers * hopper::kWarpgroup);

      hopper::wgmma_wait<1>();
      hopper::hold_registers(scores);
      release(memory.keys_empty(ring.stage));
      if (keys.last()) release(memory.queries_empty());
      if (keys.count() < kKeyTile) hide_columns_from(keys.count(), scores);
      to_weights(problem.scale, scores, state, shrink);

      hopper::order_after(state.sum[0] + state.sum[1]);
      hopper::wgmma_wait<0>();
      hopper::hold_registers(results);
      hopper::hold_registers(weights);
      release(memory.values_empty(behind.stage));
      multiply_rows(shrink, results);
      pack_weights(scores, weights);
    }

    await_values<kDim>(memory, ring, keys, problem.tokens, consumer);
    hopper::hold_registers(results);
    hopper::hold_registers(weights);
    hopper::wgmma_fence();
    operands.multiply_values(ring.stage, weights, results);
    hopper::wgmma_wait<0>();
    hopper::hold_registers(results);
    release(memory.values_empty(ring.stage));
    ring.advance();

    float factor[2], lse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      constexpr float kLn2 = 0.693147180559945f;
      const float sum = sum_of_four_threads(state.sum[row]);
      factor[row] = 1.0f / sum;
      lse[row] = kLn2 * (problem.scale * state.largest[row] + log2f(sum));
    }
    store<kDim>(results, factor, lse, tile, consumer, problem);
  }
  // Takes the last arrival, so that the barrier is left as it was found.
  if (kTakeTurns && consumer == 0) hopper::named_barrier_sync(kTurnBarrier, kConsumers * hopper::kWarpgroup);
}

}  // namespace u4d
