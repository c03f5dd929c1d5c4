#include "kernels/multi_stream_attention_fp8/multi_stream_attention_fp8.h"

#include "kernels/common/tensor_map.h"
#include "kernels/multi_stream_attention/attention_kernel.cuh"
#include "kernels/multi_stream_attention_fp8/e4m3_products.cuh"
#include "kernels/multi_stream_attention_fp8/quantize.cuh"

namespace u4d {
namespace {

template <int kDim>
Status launch_quantize(void* stream, const QuantizeProblem& problem, int64_t batch) {
  const int64_t heads = batch * problem.heads;
  if (heads * problem.slices > INT_MAX) return kTooLarge;
  const unsigned int blocks = static_cast<unsigned int>(heads * problem.slices);
  U4D_LAUNCH(extents_kernel<kDim>, blocks, kQuantizeThreads, 0, stream, problem);
  if (Status status = launch_status()) return status;
  U4D_LAUNCH(head_scales_kernel, static_cast<unsigned int>(heads), kWarp, 0, stream, problem.extents, problem.slices,
             problem.head_scales);
  if (Status status = launch_status()) return status;
  U4D_LAUNCH(quantize_kernel<kDim>, blocks, kQuantizeThreads, 0, stream, problem);
  return launch_status();
}

// Copies of whole rows of contiguous [batch, tokens, heads, kDim].
template <int kDim>
TensorLayout rows_of_e4m3(const AttentionProblem& problem, int rows) {
  const int64_t token = int64_t(problem.heads) * kDim;
  return {{kDim, problem.heads, problem.tokens, problem.batch},
          {1, kDim, token, problem.tokens * token},
          {kDim, 1, rows, 1},
          CU_TENSOR_MAP_DATA_TYPE_UINT8};
}

template <int kDim>
Status launch(void* stream, const E4m3Problem& problem, const E4m3* q, const E4m3* k, const E4m3* v,
              int64_t most_tiles) {
  using Products = E4m3Products<kDim>;
  const int64_t padded = attention_padded(problem.tokens), head = kDim * padded;
  const TensorLayout values{{padded, kDim, problem.heads, problem.batch},
                            {1, padded, head, problem.heads * head},
                            {Products::kKeyTile, kDim, 1, 1},
                            CU_TENSOR_MAP_DATA_TYPE_UINT8};
  CUtensorMap q_map, k_map, v_map;
  Status status = encode_tensor_map(&q_map, q, rows_of_e4m3<kDim>(problem, kAttentionQueryTile));
  if (status == kOk) status = encode_tensor_map(&k_map, k, rows_of_e4m3<kDim>(problem, Products::kKeyTile));
  if (status == kOk) status = encode_tensor_map(&v_map, v, values);
  if (status != kOk) return status;
  return launch_attention<Products>(stream, q_map, k_map, v_map, problem, most_tiles);
}

}  // namespace

Status multi_stream_attention_fp8_quantize_cuda(void* stream, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                                                int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                                                int64_t q_clip_stride, int64_t q_token_stride, int64_t q_head_stride,
                                                int64_t k_clip_stride, int64_t k_token_stride, int64_t k_head_stride,
                                                int64_t v_clip_stride, int64_t v_token_stride, int64_t v_head_stride,
                                                int64_t group_size, const uint8_t* mask, int64_t mask_clip_stride,
                                                int64_t mask_query_stride, int64_t mask_key_stride, uint8_t* seen,
                                                uint32_t* extents, E4m3* q_values, float* q_scale, E4m3* k_values,
                                                E4m3* v_values, float* head_scales) {
  if (batch < 0 || tokens < 0 || heads < 0 || group_size < 1 || tokens % group_size) return kInvalidArgument;
  if (head_dim != 64 && head_dim != 128) return kInvalidArgument;
  if (batch == 0 || tokens == 0 || heads == 0) return kOk;
  const int64_t groups = tokens / group_size;
  if (mask && groups > kAttentionMaxGroups) return kTooLarge;
  if (batch > 65535 || heads > INT_MAX || tokens > INT_MAX - kAttentionSlice) return kTooLarge;
  GroupMask by_anybody{mask, mask_clip_stride, 0, mask_key_stride};
  if (mask && mask_query_stride != 0) {
    const GroupMask by_query{mask, mask_clip_stride, mask_query_stride, mask_key_stride};
    const dim3 grid(blocks_for(groups, kQuantizeThreads), static_cast<unsigned int>(batch));
    U4D_LAUNCH(seen_kernel, grid, kQuantizeThreads, 0, stream, by_query, static_cast<int>(groups), seen);
    if (Status status = launch_status()) return status;
    by_anybody = {seen, groups, 0, 1};
  }
  QuantizeProblem problem;
  problem.tokens = static_cast<int>(tokens);
  problem.heads = static_cast<int>(heads);
  problem.group_size = static_cast<int>(group_size);
  problem.slices = static_cast<int>(attention_slices(tokens));
  problem.padded = attention_padded(tokens);
  problem.seen = by_anybody;
  problem.q = {reinterpret_cast<const Bfloat16*>(q), {q_clip_stride, q_token_stride, q_head_stride}};
  problem.k = {reinterpret_cast<const Bfloat16*>(k), {k_clip_stride, k_token_stride, k_head_stride}};
  problem.v = {reinterpret_cast<const Bfloat16*>(v), {v_clip_stride, v_token_stride, v_head_stride}};
  problem.extents = reinterpret_cast<Extents*>(extents);
  problem.head_scales = reinterpret_cast<HeadScales*>(head_scales);
  problem.q_values = q_values;
  problem.q_scale = q_scale;
  problem.k_values = k_values;
  problem.v_values = v_values;
  return (head_dim == 64 ? launch_quantize<64> : launch_quantize<128>)(stream, problem, batch);
}

Status multi_stream_attention_fp8_cuda(void* stream, const E4m3* q_values, const float* q_scale, const E4m3* k_values,
                                       const E4m3* v_values, const float* head_scales, int64_t batch, int64_t tokens,
                                       int64_t heads, int64_t head_dim, int64_t group_size, const uint8_t* mask,
                                       int64_t mask_clip_stride, int64_t mask_query_stride, int64_t mask_key_stride,
                                       int32_t* plan, uint16_t* out, float* lse) {
  const GroupMask group_mask{mask, mask_clip_stride, mask_query_stride, mask_key_stride};
  E4m3Problem problem;
  int64_t most_tiles;
  const Status status = plan_attention(stream, batch, tokens, heads, head_dim, group_size, group_mask, plan, out, lse,
                                       &problem, &most_tiles);
  if (status != kOk || most_tiles == 0) return status;
  problem.q_scale = q_scale;
  problem.head_scales = reinterpret_cast<const HeadScales*>(head_scales);
  const auto run = head_dim == 64 ? launch<64> : launch<128>;
  return run(stream, problem, q_values, k_values, v_values, most_tiles);
}

}  // namespace u4d
