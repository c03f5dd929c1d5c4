// What each tile of queries sees, as the attention kernel reads it: made from the mask on the GPU, so that nothing
// waits for the host and a captured graph follows a mask that changes.
//
// A clip's plan is int32: the number of tiles; three numbers for each possible tile (first query, queries, where its
// key list stands in the plan); and a key list for each row of the mask: the number of runs, then first and end of
// each. Neighbouring query groups with equal rows make one run of queries, neighbouring visible key groups one run of
// keys, so only the last tile of a run is not full, whatever the group size is.
#pragma once

#include "kernels/common/launch.h"
#include "kernels/multi_stream_attention/multi_stream_attention.h"

namespace u4d {

struct GroupMask {
  const uint8_t* seen;  // null: all see all
  int64_t clip_stride, query_stride, key_stride;
};

struct PlanSizes {
  int groups;       // of keys
  int group_size;   // of keys
  int rows;         // rows of the mask: groups, or 1 where all queries see the same
  int row_queries;  // queries that a row stands for
  int max_tiles;
  int list_size;   // of a key list
  int64_t stride;  // from clip to clip
};

inline PlanSizes plan_sizes(int64_t groups, int64_t group_size, bool by_query) {
  PlanSizes sizes;
  sizes.groups = static_cast<int>(groups);
  sizes.group_size = static_cast<int>(group_size);
  sizes.rows = by_query ? sizes.groups : 1;
  sizes.row_queries = by_query ? sizes.group_size : static_cast<int>(groups * group_size);
  sizes.max_tiles = sizes.rows * ((sizes.row_queries + kAttentionQueryTile - 1) / kAttentionQueryTile);
  sizes.list_size = 1 + 2 * ((sizes.groups + 1) / 2);
  sizes.stride = attention_plan_size(groups, group_size, by_query);
  return sizes;
}

// Whether the tiles of all clips and heads can be counted as QueryTiles does.
inline bool countable(int64_t batch, int64_t heads, const PlanSizes& sizes) {
  constexpr int64_t kMost = int64_t(1) << 31;
  return batch < kMost && heads < kMost && batch * heads < kMost / sizes.max_tiles;
}

__device__ __forceinline__ bool same_rows(const uint8_t* a, const uint8_t* b, const GroupMask& mask, int groups) {
  bool same = true;
  for (int key = 0; key < groups; ++key) {
    same = same && (a[key * mask.key_stride] != 0) == (b[key * mask.key_stride] != 0);
  }
  return same;
}

__device__ __forceinline__ void list_runs(const uint8_t* row, const GroupMask& mask, const PlanSizes& sizes,
                                          int32_t* list) {
  int runs = 0;
  bool open = false;
  for (int key = 0; key < sizes.groups; ++key) {
    const bool seen = !row || row[key * mask.key_stride] != 0;
    if (seen && !open) list[1 + 2 * runs] = key * sizes.group_size;
    if (seen) list[2 + 2 * runs] = (key + 1) * sizes.group_size;
    if (!seen && open) ++runs;
    open = seen;
  }
  list[0] = runs + (open ? 1 : 0);
}

constexpr int kPlanThreads = 256;

namespace {  // more than one op has this kernel

// One block per clip.
__global__ __launch_bounds__(kPlanThreads) void plan_kernel(GroupMask mask, PlanSizes sizes, int32_t* plan) {
  __shared__ bool starts[kAttentionMaxGroups + 1];  // a row that differs from the one before
  __shared__ int first_tile[kAttentionMaxGroups + 1];
  __shared__ int run_end[kAttentionMaxGroups];
  int32_t* mine = plan + blockIdx.x * sizes.stride;
  int32_t* lists = mine + 1 + 3 * sizes.max_tiles;
  const uint8_t* seen = mask.seen ? mask.seen + blockIdx.x * mask.clip_stride : nullptr;
  const int thread = static_cast<int>(threadIdx.x);

  for (int row = thread; row < sizes.rows; row += kPlanThreads) {
    const uint8_t* bytes = seen ? seen + row * mask.query_stride : nullptr;
    const bool start = row == 0 || (bytes && !same_rows(bytes - mask.query_stride, bytes, mask, sizes.groups));
    starts[row] = start;
    if (start) list_runs(bytes, mask, sizes, lists + row * sizes.list_size);
  }
  __syncthreads();
  if (thread == 0) {
    int tiles = 0;
    for (int row = 0; row < sizes.rows;) {
      int end = row + 1;
      while (end < sizes.rows && !starts[end]) ++end;
      first_tile[row] = tiles;
      run_end[row] = end;
      tiles += ((end - row) * sizes.row_queries + kAttentionQueryTile - 1) / kAttentionQueryTile;
      row = end;
    }
    mine[0] = tiles;
  }
  __syncthreads();
  for (int row = thread; row < sizes.rows; row += kPlanThreads) {
    if (!starts[row]) continue;
    const int end = run_end[row] * sizes.row_queries;
    int32_t* tile = mine + 1 + 3 * first_tile[row];
    for (int query = row * sizes.row_queries; query < end; query += kAttentionQueryTile, tile += 3) {
      tile[0] = query;
      tile[1] = end - query < kAttentionQueryTile ? end - query : kAttentionQueryTile;
      tile[2] = 1 + 3 * sizes.max_tiles + row * sizes.list_size;
    }
  }
}

}  // namespace

// A tile of queries of one head.
struct QueryTile {
  int clip, head;
  int first, count;
  const int32_t* keys;
};

// Hands out the tiles of all clips and heads to the blocks of a persistent grid. Neighbouring blocks work on one head
// at a time, so that its keys stay in L2.
struct QueryTiles {
  const int32_t* plan;
  int64_t stride;
  int batch, heads;
  unsigned next;  // counted from the first tile of `clip`
  int clip;

  __device__ __forceinline__ QueryTiles(const int32_t* plan_, int64_t stride_, int batch_, int heads_)
      : plan(plan_), stride(stride_), batch(batch_), heads(heads_), next(blockIdx.x), clip(0) {}

  __device__ __forceinline__ bool take(QueryTile* tile) {
    for (; clip < batch; ++clip) {
      const int32_t* mine = plan + clip * stride;
      const auto of_head = static_cast<unsigned>(mine[0]), tiles = of_head * heads;
      if (next < tiles) {
        const int32_t* entry = mine + 1 + 3 * (next % of_head);
        *tile = {clip, static_cast<int>(next / of_head), entry[0], entry[1], mine + entry[2]};
        next += gridDim.x;
        return true;
      }
      next -= tiles;
    }
    return false;
  }
};

// Walks through a key list, kTile keys at a time. A run's first tile begins at a multiple of kAlignment, and so perhaps
// with keys that belong to others.
template <int kTile_, int kAlignment = 1>
struct KeyTiles {
  static constexpr int kTile = kTile_;
  const int32_t* run;
  int runs;  // the one at hand and those after it
  int first, end;

  __device__ __forceinline__ explicit KeyTiles(const int32_t* list) : run(list + 1), runs(list[0]), first(0), end(0) {
    begin_run();
  }
  __device__ __forceinline__ bool any() const { return runs > 0; }
  __device__ __forceinline__ bool last() const { return runs == 1 && end - first <= kTile; }
  __device__ __forceinline__ int count() const { return end - first < kTile ? end - first : kTile; }
  // Keys of the tile that come before the run.
  __device__ __forceinline__ int before() const { return kAlignment == 1 || first >= run[0] ? 0 : run[0] - first; }
  __device__ __forceinline__ void advance() {
    first += kTile;
    if (first < end) return;
    run += 2;
    --runs;
    begin_run();
  }
  __device__ __forceinline__ void begin_run() {
    if (runs > 0) first = run[0] / kAlignment * kAlignment, end = run[1];
  }
};

}  // namespace u4d
