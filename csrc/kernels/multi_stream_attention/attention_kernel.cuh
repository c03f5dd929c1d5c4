// The attention kernel and its launch, for any kind of products.
#pragma once

#include <climits>
#include <cmath>

#include "kernels/multi_stream_attention/consume.cuh"

namespace u4d {
namespace {  // more than one op has these

// One block per SM; it takes tile after tile.
template <class Products>
__global__ __launch_bounds__(kAttentionThreads, 1) void attention_kernel(const __grid_constant__ CUtensorMap q_map,
                                                                         const __grid_constant__ CUtensorMap k_map,
                                                                         const __grid_constant__ CUtensorMap v_map,
                                                                         const __grid_constant__
                                                                         typename Products::Problem problem) {
  U4D_DYNAMIC_SHARED(dynamic);
  const typename Products::Memory memory(dynamic);
  if (threadIdx.x == 0) {
    hopper::prefetch_tensor_map(&q_map);
    hopper::prefetch_tensor_map(&k_map);
    hopper::prefetch_tensor_map(&v_map);
    memory.init_barriers();
  }
  __syncthreads();
  // 128 * 24 + 256 * 240 registers are just within the 65,536 of an SM.
  if (threadIdx.x < hopper::kWarpgroup) {
    hopper::registers_decrease<24>();
    if (threadIdx.x == 0) produce<Products>(memory, &q_map, &k_map, &v_map, problem);
  } else {
    hopper::registers_increase<240>();
    consume<Products>(memory, problem);
  }
}

constexpr int kMostKeysOfTile = 256;

// What every launcher checks and sets, and the plan. Nothing else is to be done where *most_tiles is 0; else there are
// at most so many tiles of queries, over all clips and heads.
inline Status plan_attention(void* stream, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                             int64_t group_size, const GroupMask& mask, int32_t* plan, uint16_t* out, float* lse,
                             AttentionProblem* problem, int64_t* most_tiles) {
  *most_tiles = 0;
  if (batch < 0 || tokens < 0 || heads < 0 || group_size < 1 || tokens % group_size) return kInvalidArgument;
  if (head_dim != 64 && head_dim != 128) return kInvalidArgument;
  if (batch == 0 || tokens == 0 || heads == 0) return kOk;
  const bool by_query = mask.seen && mask.query_stride != 0;
  // Without a mask all tokens are one group.
  const int64_t groups = mask.seen ? tokens / group_size : 1;
  if (groups > kAttentionMaxGroups) return kTooLarge;
  if (tokens > INT_MAX - kMostKeysOfTile) return kTooLarge;  // tiles may reach past the end
  const PlanSizes sizes = plan_sizes(groups, tokens / groups, by_query);
  if (!countable(batch, heads, sizes)) return kTooLarge;
  U4D_LAUNCH(plan_kernel, static_cast<unsigned int>(batch), kPlanThreads, 0, stream, mask, sizes, plan);
  problem->plan = plan;
  problem->plan_stride = sizes.stride;
  problem->batch = static_cast<int>(batch);
  problem->tokens = static_cast<int>(tokens);
  problem->heads = static_cast<int>(heads);
  problem->scale = static_cast<float>(1.44269504088896340736 / std::sqrt(static_cast<double>(head_dim)));
  problem->out = out;
  problem->lse = lse;
  *most_tiles = batch * heads * sizes.max_tiles;
  return launch_status();
}

// At most `most_tiles` tiles of queries, over all clips and heads.
template <class Products>
Status launch_attention(void* stream, const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map,
                        const typename Products::Problem& problem, int64_t most_tiles) {
  constexpr int kBytes = Products::Memory::kBytes;
  int multiprocessors = 0;
  Status status = allow_shared_memory(attention_kernel<Products>, kBytes);
  if (status == kOk) status = count_multiprocessors(&multiprocessors);
  if (status != kOk) return status;
  const int64_t blocks = most_tiles < multiprocessors ? most_tiles : multiprocessors;
  U4D_LAUNCH(attention_kernel<Products>, static_cast<unsigned int>(blocks), kAttentionThreads, kBytes, stream, q_map,
             k_map, v_map, problem);
  return launch_status();
}

}  // namespace
}  // namespace u4d
