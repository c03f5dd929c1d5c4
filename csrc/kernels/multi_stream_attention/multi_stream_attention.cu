#include "kernels/multi_stream_attention/multi_stream_attention.h"

#include <climits>
#include <cmath>

#include "kernels/common/tensor_map.h"
#include "kernels/multi_stream_attention/consume.cuh"

namespace u4d {
namespace {

constexpr int kThreads = (1 + kConsumers) * hopper::kWarpgroup;

// One block per SM; it takes tile after tile.
template <int kDim>
__global__ __launch_bounds__(kThreads, 1) void attention_kernel(const __grid_constant__ CUtensorMap q_map,
                                                                const __grid_constant__ CUtensorMap k_map,
                                                                const __grid_constant__ CUtensorMap v_map,
                                                                const __grid_constant__ AttentionProblem problem) {
  U4D_DYNAMIC_SHARED(dynamic);
  const TileMemory<kDim> memory(dynamic);
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
    if (threadIdx.x == 0) produce<kDim>(memory, &q_map, &k_map, &v_map, problem);
  } else {
    hopper::registers_increase<240>();
    consume<kDim>(memory, problem);
  }
}

struct Strides {
  int64_t clip, token, head;
};

TensorLayout layout_of(const AttentionProblem& problem, int64_t dim, const Strides& strides, int rows) {
  // A dimension of one element may come with any stride.
  const auto stride = [](int size, int64_t elements) { return size > 1 ? elements : int64_t(8); };
  return {{dim, problem.heads, problem.tokens, problem.batch},
          {1, stride(problem.heads, strides.head), stride(problem.tokens, strides.token),
           stride(problem.batch, strides.clip)},
          {kChannelBlock, 1, rows, 1}};
}

template <int kDim>
Status launch(void* stream, const AttentionProblem& problem, const uint16_t* q, const Strides& q_strides,
              const uint16_t* k, const Strides& k_strides, const uint16_t* v, const Strides& v_strides,
              int64_t most_tiles) {
  CUtensorMap q_map, k_map, v_map;
  Status status = encode_tensor_map(&q_map, q, layout_of(problem, kDim, q_strides, kAttentionQueryTile));
  if (status == kOk) status = encode_tensor_map(&k_map, k, layout_of(problem, kDim, k_strides, kKeyTile));
  if (status == kOk) status = encode_tensor_map(&v_map, v, layout_of(problem, kDim, v_strides, kKeyTile));
  if (status == kOk) status = allow_shared_memory(attention_kernel<kDim>, TileMemory<kDim>::kBytes);
  int multiprocessors = 0;
  if (status == kOk) status = count_multiprocessors(&multiprocessors);
  if (status != kOk) return status;
  const int64_t blocks = most_tiles < multiprocessors ? most_tiles : multiprocessors;
  U4D_LAUNCH(attention_kernel<kDim>, static_cast<unsigned int>(blocks), kThreads, TileMemory<kDim>::kBytes, stream,
             q_map, k_map, v_map, problem);
  return launch_status();
}

}  // namespace

Status multi_stream_attention_cuda(void* stream, const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t batch,
                                   int64_t tokens, int64_t heads, int64_t head_dim, int64_t q_clip_stride,
                                   int64_t q_token_stride, int64_t q_head_stride, int64_t k_clip_stride,
                                   int64_t k_token_stride, int64_t k_head_stride, int64_t v_clip_stride,
                                   int64_t v_token_stride, int64_t v_head_stride, int64_t group_size,
                                   const uint8_t* mask, int64_t mask_clip_stride, int64_t mask_query_stride,
                                   int64_t mask_key_stride, int32_t* plan, uint16_t* out, float* lse) {
  if (batch < 0 || tokens < 0 || heads < 0 || group_size < 1 || tokens % group_size) return kInvalidArgument;
  if (head_dim != 64 && head_dim != 128) return kInvalidArgument;
  if (batch == 0 || tokens == 0 || heads == 0) return kOk;
  const bool by_query = mask && mask_query_stride != 0;
  // Without a mask all tokens are one group.
  const int64_t groups = mask ? tokens / group_size : 1;
  if (groups > kAttentionMaxGroups || batch > INT_MAX || heads > INT_MAX) return kTooLarge;
  if (tokens > INT_MAX - kKeyTile) return kTooLarge;  // tiles may reach past the end
  const PlanSizes sizes = plan_sizes(groups, tokens / groups, by_query);
  const GroupMask group_mask{mask, mask_clip_stride, mask_query_stride, mask_key_stride};
  U4D_LAUNCH(plan_kernel, static_cast<unsigned int>(batch), kPlanThreads, 0, stream, group_mask, sizes, plan);
  if (Status status = launch_status()) return status;

  AttentionProblem problem;
  problem.plan = plan;
  problem.plan_stride = sizes.stride;
  problem.batch = static_cast<int>(batch);
  problem.tokens = static_cast<int>(tokens);
  problem.heads = static_cast<int>(heads);
  problem.scale = static_cast<float>(1.44269504088896340736 / std::sqrt(static_cast<double>(head_dim)));
  problem.out = out;
  problem.lse = lse;
  const Strides q_strides{q_clip_stride, q_token_stride, q_head_stride};
  const Strides k_strides{k_clip_stride, k_token_stride, k_head_stride};
  const Strides v_strides{v_clip_stride, v_token_stride, v_head_stride};
  const int64_t most_tiles = batch * heads * sizes.max_tiles;
  const auto run = head_dim == 64 ? launch<64> : launch<128>;
  return run(stream, problem, q, q_strides, k, k_strides, v, v_strides, most_tiles);
}

}  // namespace u4d
