// Tiles of rows of q, k, v and their gradients: how they come into shared memory, and how results go out.
#pragma once

#include "kernels/common/hopper.h"
#include "kernels/common/stages.h"
#include "kernels/common/tensor_map.h"
#include "kernels/multi_stream_attention/plan.cuh"

namespace u4d {

constexpr int kConsumers = 2;  // warpgroups that compute, each for half of the rows of a tile
constexpr int kConsumerRows = kAttentionQueryTile / kConsumers;
constexpr int kConsumerWarps = kConsumers * hopper::kWarpgroup / kWarp;
constexpr int kAttentionThreads = (1 + kConsumers) * hopper::kWarpgroup;
constexpr int kChannelBlock = 64;  // channels of a 128-byte row of shared memory
constexpr int kRowBytes = 128;
constexpr unsigned kEightRows = 8 * kRowBytes;
constexpr int kStep = 16;  // of the inner dimension, one instruction

template <int kDim>
__device__ __forceinline__ void load_rows(unsigned char* shared, int block_bytes, const CUtensorMap* map,
                                          uint64_t* full, int head, int row, int clip) {
  hopper::barrier_arrive_expect(full, kDim / kChannelBlock * block_bytes);
  for (int block = 0; block < kDim / kChannelBlock; ++block) {
    hopper::tma_load_4d(shared + block * block_bytes, map, full, block * kChannelBlock, head, row, clip);
  }
}

// Rows from `count` on belong to groups that are not seen. Their weight is 0, but 0 * NaN is NaN. Each consumer clears
// all of them for itself; all write the same zeros. fence_async_shared() and a barrier of the consumer follow.
template <int kDim, int kBlock>
__device__ __forceinline__ void clear_rows_from(int count, unsigned char* tile) {
  const int thread = static_cast<int>(threadIdx.x) % hopper::kWarpgroup;
  for (int block = 0; block < kDim / kChannelBlock; ++block) {
    for (int byte = count * kRowBytes + 8 * thread; byte < kBlock; byte += 8 * hopper::kWarpgroup) {
      *reinterpret_cast<uint64_t*>(tile + block * kBlock + byte) = 0;
    }
  }
}

// The row of a tile that a thread of a consumer holds in its accumulators; its other row (half 1) is 8 further on.
__device__ __forceinline__ int tile_row(int consumer, int half) {
  const int thread = static_cast<int>(threadIdx.x) % hopper::kWarpgroup;
  return consumer * kConsumerRows + thread / kWarp * 16 + thread % kWarp / 4 + 8 * half;
}

// This thread's half row, times a factor, into a contiguous tensor [batch, tokens, heads, kDim].
template <int kDim>
__device__ __forceinline__ void store_row(const float (&results)[kDim / 2], int half, float factor,
                                          const QueryTile& tile, int row, int tokens, int heads, uint16_t* out) {
  uint16_t* to = out + ((tile.clip * int64_t(tokens) + tile.first + row) * heads + tile.head) * kDim;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const int at = 4 * i + 2 * half;
    *reinterpret_cast<uint32_t*>(to + 8 * i + 2 * (threadIdx.x % 4)) =
        hopper::pack_bf16(results[at] * factor, results[at + 1] * factor);
  }
}

// Elements between neighbours of a tensor [batch, tokens, heads, channels].
struct Strides {
  int64_t clip, token, head;
};

// For copies of `rows` tokens of one head, 64 channels at a time.
inline TensorLayout rows_layout(int64_t batch, int64_t tokens, int64_t heads, int64_t dim, const Strides& strides,
                                int rows) {
  // A dimension of one element may come with any stride: it gets that of a dense tensor.
  const int64_t head = heads > 1 ? strides.head : dim;
  const int64_t token = tokens > 1 ? strides.token : heads * head;
  const int64_t clip = batch > 1 ? strides.clip : tokens * token;
  return {{dim, heads, tokens, batch}, {1, head, token, clip}, {kChannelBlock, 1, rows, 1}};
}

}  // namespace u4d
