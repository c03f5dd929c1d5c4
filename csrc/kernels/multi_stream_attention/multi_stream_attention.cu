#include "kernels/multi_stream_attention/multi_stream_attention.h"

#include "kernels/multi_stream_attention/attention_kernel.cuh"
#include "kernels/multi_stream_attention/bfloat16_products.cuh"

namespace u4d {
namespace {

template <int kDim>
Status launch(void* stream, const AttentionProblem& problem, const uint16_t* q, const Strides& q_strides,
              const uint16_t* k, const Strides& k_strides, const uint16_t* v, const Strides& v_strides,
              int64_t most_tiles) {
  using Products = Bfloat16Products<kDim>;
  CUtensorMap q_map, k_map, v_map;
  const auto encode = [&](CUtensorMap* map, const uint16_t* data, const Strides& strides, int rows) {
    const TensorLayout layout = rows_layout(problem.batch, problem.tokens, problem.heads, kDim, strides, rows);
    return encode_tensor_map(map, data, layout);
  };
  Status status = encode(&q_map, q, q_strides, kAttentionQueryTile);
  if (status == kOk) status = encode(&k_map, k, k_strides, Products::kKeyTile);
  if (status == kOk) status = encode(&v_map, v, v_strides, Products::kKeyTile);
  if (status != kOk) return status;
  return launch_attention<Products>(stream, q_map, k_map, v_map, problem, most_tiles);
}

}  // namespace

Status multi_stream_attention_cuda(void* stream, const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t batch,
                                   int64_t tokens, int64_t heads, int64_t head_dim, int64_t q_clip_stride,
                                   int64_t q_token_stride, int64_t q_head_stride, int64_t k_clip_stride,
                                   int64_t k_token_stride, int64_t k_head_stride, int64_t v_clip_stride,
                                   int64_t v_token_stride, int64_t v_head_stride, int64_t group_size,
                                   const uint8_t* mask, int64_t mask_clip_stride, int64_t mask_query_stride,
                                   int64_t mask_key_stride, int32_t* plan, uint16_t* out, float* lse) {
  const GroupMask group_mask{mask, mask_clip_stride, mask_query_stride, mask_key_stride};
  AttentionProblem problem;
  int64_t most_tiles;
  const Status status = plan_attention(stream, batch, tokens, heads, head_dim, group_size, group_mask, plan, out, lse,
                                       &problem, &most_tiles);
  if (status != kOk || most_tiles == 0) return status;
  const Strides q_strides{q_clip_stride, q_token_stride, q_head_stride};
  const Strides k_strides{k_clip_stride, k_token_stride, k_head_stride};
  const Strides v_strides{v_clip_stride, v_token_stride, v_head_stride};
  const auto run = head_dim == 64 ? launch<64> : launch<128>;
  return run(stream, problem, q, q_strides, k, k_strides, v, v_strides, most_tiles);
}

}  // namespace u4d
