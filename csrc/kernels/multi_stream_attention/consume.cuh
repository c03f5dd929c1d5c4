// The warpgroups that compute: 64 queries each, over all keys that the tile sees. What the products are made of, a
// template argument says: Bfloat16Products, E4m3Products (multi_stream_attention_fp8).
#pragma once

#include "kernels/common/warpgroup.h"
#include "kernels/multi_stream_attention/softmax.cuh"
#include "kernels/multi_stream_attention/tile_memory.cuh"

namespace u4d {

// While one consumer's products run, the other's exponentials do: they take turns in issuing products.
constexpr bool kTakeTurns = true;

// The results of this thread's two rows.
template <int kDim>
__device__ __forceinline__ void store(const float (&results)[kDim / 2], const float (&factor)[2], const float (&lse)[2],
                                      const QueryTile& tile, int consumer, const AttentionProblem& problem) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile_row(consumer, half);
    if (row >= tile.count) continue;
    store_row<kDim>(results, half, factor[half], tile, row, problem.tokens, problem.heads, problem.out);
    if (threadIdx.x % 4 == 0) {
      problem.lse[(tile.clip * int64_t(problem.heads) + tile.head) * problem.tokens + tile.first + row] = lse[half];
    }
  }
}

// Keys of the tile that belong to others have no weight.
template <class Keys, int kCount>
__device__ __forceinline__ void hide_others(const Keys& keys, float (&scores)[kCount]) {
  if (keys.count() < Keys::kTile) hide_columns_from(keys.count(), scores);
  if (keys.before() > 0) hide_columns_before(keys.before(), scores);
}

// The scores of the next keys are under way while the weights of these meet their values; the exponentials of the next
// overlap with that.
template <class Products>
__device__ __forceinline__ void consume(const typename Products::Memory& memory,
                                        const typename Products::Problem& problem) {
  using Memory = typename Products::Memory;
  constexpr int kDim = Products::kDim, kKeyTile = Products::kKeyTile;
  const int consumer = warpgroup_index() - 1;
  Products products(memory, problem, consumer);
  Ring<Memory::kStages> ring;
  unsigned query_parity = 0;
  typename Products::Sum sum;
  float scores[kKeyTile / 2], shrink[2];
  uint32_t weights[Products::kWeights];

  if (kTakeTurns && consumer == 1) hopper::named_barrier_arrive(kTurnBarrier, kConsumers * hopper::kWarpgroup);
  QueryTiles tiles(problem.plan, problem.plan_stride, problem.batch, problem.heads);
  for (QueryTile tile; tiles.take(&tile);) {
    typename Products::Keys keys(tile.keys);
    sum.clear();
    if (!keys.any()) {
      store<kDim>(sum.results, {1.0f, 1.0f}, {-INFINITY, -INFINITY}, tile, consumer, problem);
      continue;
    }
    RowState state = empty_rows();
    products.begin(tile);
    hopper::barrier_wait(memory.queries_full(), query_parity);
    query_parity ^= 1;

    hopper::barrier_wait(memory.keys_full(ring.stage), ring.parity);
    hopper::wgmma_fence();
    products.multiply_keys(ring.stage, scores);
    hopper::wgmma_wait<0>();
    hopper::hold_registers(scores);
    release(memory.keys_empty(ring.stage));
    if (keys.last()) release(memory.queries_empty());
    hide_others(keys, scores);
    to_weights<Products::kExponent>(products.scale, scores, state, shrink);
    Products::pack(scores, weights);

    while (!keys.last()) {
      products.await_values(memory, ring, tile, keys);
      const Ring<Memory::kStages> behind = ring;
      ring.advance();
      keys.advance();
      hopper::barrier_wait(memory.keys_full(ring.stage), ring.parity);

      if (kTakeTurns) hopper::named_barrier_sync(kTurnBarrier + consumer, kConsumers * hopper::kWarpgroup);
      hopper::hold_registers(sum.products());
      hopper::hold_registers(weights);
      hopper::wgmma_fence();
      products.multiply_keys(ring.stage, scores);
      products.multiply_values(behind.stage, weights, sum.products());
      if (kTakeTurns) hopper::named_barrier_arrive(kTurnBarrier + 1 - consumer, kConsumers * hopper::kWarpgroup);

      hopper::wgmma_wait<1>();
      hopper::hold_registers(scores);
      release(memory.keys_empty(ring.stage));
      if (keys.last()) release(memory.queries_empty());
      hide_others(keys, scores);
      to_weights<Products::kExponent>(products.scale, scores, state, shrink);

      hopper::order_after(state.sum[0] + state.sum[1]);
      hopper::wgmma_wait<0>();
      hopper::hold_registers(sum.products());
      hopper::hold_registers(weights);
      release(memory.values_empty(behind.stage));
      sum.take(shrink);
      Products::pack(scores, weights);
    }

    products.await_values(memory, ring, tile, keys);
    hopper::hold_registers(sum.products());
    hopper::hold_registers(weights);
    hopper::wgmma_fence();
    products.multiply_values(ring.stage, weights, sum.products());
    hopper::wgmma_wait<0>();
    hopper::hold_registers(sum.products());
    release(memory.values_empty(ring.stage));
    ring.advance();
    sum.finish();

    float factor[2], lse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      constexpr float kLn2 = 0.693147180559945f;
      const float total = sum_of_four_threads(state.sum[row]);
      factor[row] = products.value_scale(tile) / total;
      lse[row] = kLn2 * (products.scale[row] * state.largest[row] - Products::kExponent + log2f(total));
    }
    store<kDim>(sum.results, factor, lse, tile, consumer, problem);
  }
  // Takes the last arrival, so that the barrier is left as it was found.
  if (kTakeTurns && consumer == 0) hopper::named_barrier_sync(kTurnBarrier, kConsumers * hopper::kWarpgroup);
}

}  // namespace u4d
