#include "kernels/multi_stream_attention_grad/multi_stream_attention_grad.h"

#include <climits>
#include <cmath>

#include "kernels/multi_stream_attention_grad/consume_grad.cuh"
#include "kernels/multi_stream_attention_grad/query_facts.cuh"

namespace u4d {
namespace {

// One block per SM; it takes tile after tile.
template <int kDim, Owner kOwner>
__global__ __launch_bounds__(kAttentionThreads,
                             1) void attention_grad_kernel(const __grid_constant__ GradMaps maps,
                                                           const __grid_constant__ GradProblem problem) {
  U4D_DYNAMIC_SHARED(dynamic);
  const GradMemory<kDim, kOwner> memory(dynamic);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      hopper::prefetch_tensor_map(&maps.own[i]);
      hopper::prefetch_tensor_map(&maps.met[i]);
    }
    memory.init_barriers();
  }
  __syncthreads();
  // 128 * 24 + 256 * 240 registers are just within the 65,536 of an SM.
  if (threadIdx.x < hopper::kWarpgroup) {
    hopper::registers_decrease<24>();
    if (threadIdx.x == 0) {
      bring_tiles(memory, maps, problem);
    } else if constexpr (kOwner == Owner::kKeys) {
      const int query = static_cast<int>(threadIdx.x) - kWarp;
      if (query >= 0 && query < kMetRows<kDim, kOwner>) bring_facts(memory, problem, query);
    }
  } else {
    hopper::registers_increase<240>();
    consume(memory, problem);
  }
}

struct Rows {
  const uint16_t* data;
  Strides strides;
};

template <int kDim, Owner kOwner>
Status launch_owner(void* stream, const GradProblem& problem, const Rows (&own)[2], const Rows (&met)[2],
                    int64_t max_tiles) {
  using Memory = GradMemory<kDim, kOwner>;
  GradMaps maps;
  const auto encode = [&](CUtensorMap* map, const Rows& rows, int count) {
    const TensorLayout layout = rows_layout(problem.batch, problem.tokens, problem.heads, kDim, rows.strides, count);
    return encode_tensor_map(map, rows.data, layout);
  };
  Status status = kOk;
  for (int i = 0; i < 2; ++i) {
    if (status == kOk) status = encode(&maps.own[i], own[i], kAttentionQueryTile);
    if (status == kOk) status = encode(&maps.met[i], met[i], Memory::kRows);
  }
  if (status == kOk) status = allow_shared_memory(attention_grad_kernel<kDim, kOwner>, Memory::kBytes);
  int multiprocessors = 0;
  if (status == kOk) status = count_multiprocessors(&multiprocessors);
  if (status != kOk) return status;
  const int64_t tiles = int64_t(problem.batch) * problem.heads * max_tiles;
  const auto blocks = static_cast<unsigned int>(tiles < multiprocessors ? tiles : multiprocessors);
  U4D_LAUNCH((attention_grad_kernel<kDim, kOwner>), blocks, kAttentionThreads, Memory::kBytes, stream, maps, problem);
  return launch_status();
}

// What the three kernels read and write.
struct Gradients {
  Rows grad, q, k, v;
  const uint16_t* out;
  const float* lse;
  QueryFacts* facts;
  uint16_t *q_grad, *k_grad, *v_grad;
  PlanSizes query_sizes, key_sizes;
  const int32_t *query_plan, *key_plan;
};

template <int kDim>
Status launch(void* stream, const Gradients& all, GradProblem problem) {
  const unsigned fact_blocks = static_cast<unsigned>(problem.batch) * static_cast<unsigned>(problem.heads) *
                               blocks_for(problem.tokens, FactRows<kDim>::kRows);
  U4D_LAUNCH(query_facts_kernel<kDim>, fact_blocks, kFactThreads, 0, stream, all.grad.data, all.grad.strides, all.out,
             all.lse, problem.heads, problem.tokens, all.facts);
  if (Status status = launch_status()) return status;

  problem.plan = all.key_plan;
  problem.plan_stride = all.key_sizes.stride;
  problem.grads = all.k_grad;
  problem.value_grads = all.v_grad;
  Status status =
      launch_owner<kDim, Owner::kKeys>(stream, problem, {all.k, all.v}, {all.q, all.grad}, all.key_sizes.max_tiles);
  if (status != kOk) return status;

  problem.plan = all.query_plan;
  problem.plan_stride = all.query_sizes.stride;
  problem.grads = all.q_grad;
  problem.value_grads = nullptr;
  return launch_owner<kDim, Owner::kQueries>(stream, problem, {all.q, all.grad}, {all.k, all.v},
                                             all.query_sizes.max_tiles);
}

}  // namespace

Status multi_stream_attention_grad_cuda(void* stream, const uint16_t* grad, const uint16_t* q, const uint16_t* k,
                                        const uint16_t* v, const uint16_t* out, const float* lse, int64_t batch,
                                        int64_t tokens, int64_t heads, int64_t head_dim, int64_t grad_clip_stride,
                                        int64_t grad_token_stride, int64_t grad_head_stride, int64_t q_clip_stride,
                                        int64_t q_token_stride, int64_t q_head_stride, int64_t k_clip_stride,
                                        int64_t k_token_stride, int64_t k_head_stride, int64_t v_clip_stride,
                                        int64_t v_token_stride, int64_t v_head_stride, int64_t group_size,
                                        const uint8_t* mask, int64_t mask_clip_stride, int64_t mask_query_stride,
                                        int64_t mask_key_stride, int32_t* plan, int32_t* key_plan, float* facts,
                                        uint16_t* q_grad, uint16_t* k_grad, uint16_t* v_grad) {
  if (batch < 0 || tokens < 0 || heads < 0 || group_size < 1 || tokens % group_size) return kInvalidArgument;
  if (head_dim != 64 && head_dim != 128) return kInvalidArgument;
  if (batch == 0 || tokens == 0 || heads == 0) return kOk;
  // Without a mask all tokens are one group.
  const int64_t groups = mask ? tokens / group_size : 1;
  if (groups > kAttentionMaxGroups) return kTooLarge;
  if (tokens > INT_MAX - kAttentionQueryTile) return kTooLarge;  // tiles may reach past the end
  // The queries of all clips and heads are counted in 32 bits.
  if (batch > INT_MAX || heads > INT_MAX || batch * heads > INT_MAX / (tokens + FactRows<64>::kRows)) return kTooLarge;
  Gradients all;
  all.query_sizes = plan_sizes(groups, tokens / groups, mask && mask_query_stride != 0);
  all.key_sizes = plan_sizes(groups, tokens / groups, mask && mask_key_stride != 0);
  if (!countable(batch, heads, all.query_sizes) || !countable(batch, heads, all.key_sizes)) return kTooLarge;
  const GroupMask seen{mask, mask_clip_stride, mask_query_stride, mask_key_stride};
  const GroupMask seen_by{mask, mask_clip_stride, mask_key_stride, mask_query_stride};
  const auto clips = static_cast<unsigned int>(batch);
  U4D_LAUNCH(plan_kernel, clips, kPlanThreads, 0, stream, seen, all.query_sizes, plan);
  if (Status status = launch_status()) return status;
  U4D_LAUNCH(plan_kernel, clips, kPlanThreads, 0, stream, seen_by, all.key_sizes, key_plan);
  if (Status status = launch_status()) return status;

  all.query_plan = plan;
  all.key_plan = key_plan;
  all.grad = {grad, {grad_clip_stride, grad_token_stride, grad_head_stride}};
  all.q = {q, {q_clip_stride, q_token_stride, q_head_stride}};
  all.k = {k, {k_clip_stride, k_token_stride, k_head_stride}};
  all.v = {v, {v_clip_stride, v_token_stride, v_head_stride}};
  all.out = out;
  all.lse = lse;
  all.facts = reinterpret_cast<QueryFacts*>(facts);
  all.q_grad = q_grad;
  all.k_grad = k_grad;
  all.v_grad = v_grad;
  GradProblem problem;
  problem.batch = static_cast<int>(batch);
  problem.tokens = static_cast<int>(tokens);
  problem.heads = static_cast<int>(heads);
  problem.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  problem.facts = all.facts;
  return (head_dim == 64 ? launch<64> : launch<128>)(stream, all, problem);
}

}  // namespace u4d
