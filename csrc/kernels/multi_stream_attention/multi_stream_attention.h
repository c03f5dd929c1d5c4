// Softmax attention in which whole groups of tokens see or do not see each other: the forward pass for Hopper (sm_90a).
//
//   q, k, v     bfloat16 [batch, tokens, heads, head_dim], head_dim 64 or 128, neighbouring channels side by side;
//               addresses and the strides of clips, tokens and heads (in elements) are multiples of 16 bytes
//   group_size  tokens in a group; tokens is a multiple of it
//   mask        bytes, not 0: seen; [batch, groups, groups] (query group, key group) with any strides; with a query
//               stride of 0 all queries see the same keys; null: all see all
//   plan        int32 [batch, attention_plan_size(...)], scratch; the mask is read on the GPU, not on the host
//   out         bfloat16 [batch, tokens, heads, head_dim], contiguous
//   lse         float32 [batch, heads, tokens]: log(sum(exp(score))), what a backward pass needs
//
// Scores are scaled by 1/sqrt(head_dim). Products are summed in float32; the weights are rounded to bfloat16 before
// they meet v, the result once at the end. A query that sees nothing gives zeros and lse = -inf. What nobody sees has
// no influence, be it NaN. At most 1024 groups. Launchers allocate nothing and do not synchronise; every output element
// is written. The same input gives the same bits.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

constexpr int64_t kAttentionMaxGroups = 1024;
constexpr int kAttentionQueryTile = 128;

// int32 elements of one clip's plan. by_query: the mask has a query stride other than 0.
inline int64_t attention_plan_size(int64_t groups, int64_t group_size, bool by_query) {
  const int64_t rows = by_query ? groups : 1;
  const int64_t run = by_query ? group_size : groups * group_size;
  const int64_t tiles = rows * ((run + kAttentionQueryTile - 1) / kAttentionQueryTile);
  return 1 + 3 * tiles + rows * (1 + 2 * ((groups + 1) / 2));
}

U4D_KERNEL Status multi_stream_attention_cuda(void* stream, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                                              int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                                              int64_t q_clip_stride, int64_t q_token_stride, int64_t q_head_stride,
                                              int64_t k_clip_stride, int64_t k_token_stride, int64_t k_head_stride,
                                              int64_t v_clip_stride, int64_t v_token_stride, int64_t v_head_stride,
                                              int64_t group_size, const uint8_t* mask, int64_t mask_clip_stride,
                                              int64_t mask_query_stride, int64_t mask_key_stride, int32_t* plan,
                                              uint16_t* out, float* lse);

}  // namespace u4d
