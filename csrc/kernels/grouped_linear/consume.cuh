// The warpgroups that compute: 64 rows of a tile each, over all channels, then bias, GELU and the way out.
#pragma once

#include "kernels/common/half_types.h"
#include "kernels/common/warpgroup.h"
#include "kernels/grouped_linear/tiles.cuh"

namespace u4d::linear {

// Consumer 1 begins when consumer 0 has issued this many stages, and stays behind by as many: while one of them
// finishes and stores its rows, the tensor cores work for the other. 0: they begin together.
constexpr int kLead = 2;

// 0 is __syncthreads'; one for each consumer, and one for both.
constexpr int kPartBarrier = 1;
constexpr int kLeadBarrier = kPartBarrier + kConsumers;

__device__ __forceinline__ int thread_of_consumer() { return static_cast<int>(threadIdx.x) % hopper::kWarpgroup; }

// Issues the products of a stage as one group. `lead`: the stages after which consumer 1 may begin; 0: it has begun.
template <class Product>
__device__ __forceinline__ void multiply_stage(uint64_t x, uint64_t weight, int accumulate, int& lead,
                                               float (&sums)[Product::kTileColumns / 2]) {
  hopper::wgmma_fence();
#pragma unroll
  for (int bytes = 0; bytes < kRowBytes; bytes += kStepBytes) {
    Product::multiply(sums, hopper::advance(x, bytes), hopper::advance(weight, bytes), accumulate || bytes);
  }
  hopper::wgmma_commit();
  if (lead > 0 && --lead == 0) hopper::named_barrier_arrive(kLeadBarrier, kConsumers * hopper::kWarpgroup);
}

// All channels of a tile. `x` and `weight` say where this consumer's rows and the columns of stage 0 are.
//
// Where a stage's sums are added to those of others, the tensor core works on the other consumer's stage meanwhile.
// Else a stage is given back while the products of the next are under way.
template <class Product>
__device__ __forceinline__ void multiply(const Memory<Product>& memory, uint64_t x, uint64_t weight, int stages,
                                         Ring<Product::kStages>& ring, int& lead,
                                         float (&sums)[Product::kTileColumns / 2]) {
  constexpr int kCount = Product::kTileColumns / 2;
  if constexpr (Product::kScaled) {
    float stage_sums[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
    for (int stage = 0; stage < stages; ++stage, ring.advance()) {
      const unsigned bytes = ring.stage * Memory<Product>::kStageBytes;
      hopper::barrier_wait(memory.full(ring.stage), ring.parity);
      hopper::hold_registers(stage_sums);
      multiply_stage<Product>(hopper::advance(x, bytes), hopper::advance(weight, bytes), 0, lead, stage_sums);
      hopper::wgmma_wait<0>();
      hopper::hold_registers(stage_sums);
      release(memory.empty(ring.stage));
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += stage_sums[i];
    }
  } else {
    int behind = 0;
    for (int stage = 0; stage < stages; ++stage, ring.advance()) {
      const unsigned bytes = ring.stage * Memory<Product>::kStageBytes;
      hopper::barrier_wait(memory.full(ring.stage), ring.parity);
      multiply_stage<Product>(hopper::advance(x, bytes), hopper::advance(weight, bytes), stage > 0, lead, sums);
      hopper::wgmma_wait<1>();
      if (stage > 0) release(memory.empty(behind));
      behind = ring.stage;
    }
    hopper::wgmma_wait<0>();
    hopper::hold_registers(sums);
    release(memory.empty(behind));
  }
}

// What belongs to the rows and columns of a tile, read before its products so that nobody waits for it after them: a
// thread's own two rows, and two of the columns, which it will write to the consumer's tables.
template <class Product>
struct Factors {
  static constexpr int kColumns = (Product::kTileColumns + hopper::kWarpgroup - 1) / hopper::kWarpgroup;
  uint32_t bias[kColumns];  // bits; nothing is done with what is read until it is needed
  float column_scale[kColumns], row_scale[2];

  __device__ __forceinline__ Factors(const Problem& problem, const Tile& tile, int first_row) {
    const int64_t columns = int64_t(tile.stream) * problem.columns, rows = int64_t(tile.stream) * problem.rows;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = tile.column + thread_of_consumer() + i * hopper::kWarpgroup;
      const bool inside = column < problem.columns;
      bias[i] = inside && problem.bias ? bias_at(problem, columns + column) : 0;
      if constexpr (Product::kScaled) column_scale[i] = inside ? problem.column_scale[columns + column] : 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 8 * half;
      if constexpr (Product::kScaled) row_scale[half] = row < problem.rows ? problem.row_scale[rows + row] : 0.0f;
    }
  }

  __device__ static __forceinline__ uint32_t bias_at(const Problem& problem, int64_t at) {
    if (problem.bias_is_float) return static_cast<const uint32_t*>(problem.bias)[at];
    return static_cast<const uint16_t*>(problem.bias)[at];
  }

  __device__ __forceinline__ void write_tables(const Memory<Product>& memory, bool bias_is_float, int consumer) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = thread_of_consumer() + i * hopper::kWarpgroup;
      if (column >= Product::kTileColumns) continue;
      memory.table(consumer, 0)[column] = half_types_detail::bit_cast<float>(bias_is_float ? bias[i] : bias[i] << 16);
      if constexpr (Product::kScaled) memory.table(consumer, 1)[column] = column_scale[i];
    }
  }
};

// v / (1 + exp(-2 sqrt(2 / pi) (v + 0.044715 v^3))), as in kernels/bias_gelu, with the factors drawn together.
__device__ __forceinline__ float gelu_of(float v) {
  constexpr float kFactor = -2.3022081987f, kCube = 0.044715f * kFactor;  // -2 sqrt(2 / pi) log2(e)
  return __fdividef(v, 1.0f + hopper::exp2_approx(v * (kFactor + kCube * (v * v))));
}

// The result of 64 columns, four values of this thread for each 8 of them; laid out as `sums`.
template <class Product>
__device__ __forceinline__ void finish_part(const float (&sums)[Product::kTileColumns / 2], int part,
                                            const Factors<Product>& factors, const float* bias,
                                            const float* column_scale, bool gelu, float (&values)[kPartColumns / 2]) {
  const int first_column = part * kPartColumns + 2 * (thread_of_consumer() % 4);
#pragma unroll
  for (int at = 0; at < kPartColumns / 2; ++at) {
    const int column = first_column + at / 4 * 8 + at % 2;
    values[at] = sums[part * kPartColumns / 2 + at];
    if constexpr (Product::kScaled) values[at] = values[at] * factors.row_scale[at % 4 / 2] * column_scale[column];
    values[at] += bias[column];
  }
  if (!gelu) return;
#pragma unroll
  for (int at = 0; at < kPartColumns / 2; ++at) values[at] = gelu_of(values[at]);
}

// To rows of 128 bytes in shared memory, as bfloat16.
__device__ __forceinline__ void write_part(const float (&values)[kPartColumns / 2], unsigned char* to) {
  const int thread = thread_of_consumer();
  const int row = thread / kWarp * 16 + thread % kWarp / 4;
#pragma unroll
  for (int at = 0; at < kPartColumns / 2; at += 2) {
    // The row 8 further on has its pieces in the same places.
    unsigned char* piece = to + (row + at % 4 / 2 * 8) * kRowBytes + (at / 4 ^ row % 8) * 16;
    *reinterpret_cast<uint32_t*>(piece + thread % 4 * 4) = hopper::pack_bf16(values[at], values[at + 1]);
  }
}

// The copy engine stores a part while the next one is written, and the last ones while the next tile is multiplied.
// `buffer` is the one that is next, tile after tile.
template <class Product>
__device__ __forceinline__ void store(const float (&sums)[Product::kTileColumns / 2], const Memory<Product>& memory,
                                      const Factors<Product>& factors, const Problem& problem, const Tile& tile,
                                      int consumer, const CUtensorMap* out_map, int& buffer) {
  factors.write_tables(memory, problem.bias_is_float, consumer);
#pragma unroll
  for (int part = 0; part < Product::kTileColumns / kPartColumns; ++part) {
    if (tile.column + part * kPartColumns >= problem.columns) break;
    unsigned char* to = memory.part(consumer, buffer);
    buffer = (buffer + 1) % Memory<Product>::kParts;
    // Thread 0 asks for all stores, so it knows when this part of the memory has been read.
    if (thread_of_consumer() == 0) hopper::store_wait_read<Memory<Product>::kParts - 1>();
    hopper::named_barrier_sync(kPartBarrier + consumer, hopper::kWarpgroup);
    float values[kPartColumns / 2];
    finish_part<Product>(sums, part, factors, memory.table(consumer, 0), memory.table(consumer, 1), problem.gelu,
                         values);
    write_part(values, to);
    hopper::fence_async_shared();
    hopper::named_barrier_sync(kPartBarrier + consumer, hopper::kWarpgroup);
    if (thread_of_consumer() == 0) {
      hopper::tma_store_4d(out_map, to, tile.column + part * kPartColumns, tile.row + consumer * kConsumerRows,
                           tile.stream, 0);
      hopper::store_commit();
    }
  }
}

template <class Product>
__device__ __forceinline__ void consume(const Memory<Product>& memory, const CUtensorMap* out_map,
                                        const Problem& problem) {
  constexpr unsigned kEightRows = 8 * kRowBytes;
  const int consumer = warpgroup_index() - 1;
  const uint64_t x = hopper::shared_descriptor(memory.x(0) + consumer * kConsumerRows * kRowBytes, 0, kEightRows,
                                               hopper::Swizzle::k128Bytes);
  const uint64_t weight = hopper::shared_descriptor(memory.weight(0), 0, kEightRows, hopper::Swizzle::k128Bytes);
  const int thread = thread_of_consumer();
  const int row_in_tile = consumer * kConsumerRows + thread / kWarp * 16 + thread % kWarp / 4;
  const int stages = (problem.depth + Product::kStageDepth - 1) / Product::kStageDepth;
  int lead = consumer == 0 ? (kLead < stages ? kLead : stages) : 0, buffer = 0;
  Ring<Product::kStages> ring;
  float sums[Product::kTileColumns / 2];
  static_assert(kLead < Product::kStages);
  if (kLead > 0 && consumer == 1) hopper::named_barrier_sync(kLeadBarrier, kConsumers * hopper::kWarpgroup);
  Tiles<Product> tiles(problem);
  for (Tile tile; tiles.take(&tile);) {
    const Factors<Product> factors(problem, tile, tile.row + row_in_tile);
    multiply<Product>(memory, x, weight, stages, ring, lead, sums);
    if (tile.row + consumer * kConsumerRows < problem.rows) {
      store<Product>(sums, memory, factors, problem, tile, consumer, out_map, buffer);
    }
  }
  // The block's shared memory is its own until it ends.
  if (thread == 0) hopper::store_wait<0>();
}

}  // namespace u4d::linear
