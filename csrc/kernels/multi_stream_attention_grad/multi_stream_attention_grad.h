// The gradients of multi_stream_attention (which see for q, k, v, group_size and mask), for Hopper (sm_90a).
//
//   grad        bfloat16 [batch, tokens, heads, head_dim], of the result; strides and address as those of q
//   out, lse    what the forward pass gave; contiguous, addresses multiples of 16 bytes
//   plan        int32 [batch, attention_plan_size(...)], scratch: what queries see
//   key_plan    int32 [batch, attention_plan_size(...)], scratch: what keys are seen by. Its rows are those of keys:
//               by_query stands for a mask with a key stride other than 0
//   facts       float32 [batch, heads, tokens, 2], scratch: lse log2(e), and delta, the sum over channels of grad * out
//   q_grad, k_grad, v_grad  bfloat16 [batch, tokens, heads, head_dim], contiguous
//
// With s = q k^T / sqrt(head_dim) and p = exp(s - lse): v_grad = p^T grad, s_grad = p (grad v^T - delta),
// q_grad = s_grad k / sqrt(head_dim), k_grad = s_grad^T q / sqrt(head_dim). Products are summed in float32; p and
// s_grad are rounded to bfloat16 before they meet the next factor, results once at the end. A query that sees nothing
// and a key that nobody sees get zeros; such rows of any input have no influence, be they NaN. Two kernels, one that
// owns keys and one that owns queries, each compute p and s_grad for themselves: nothing is added in memory, and the
// same input gives the same bits. Launchers allocate nothing and do not synchronise; every output element is written.
#pragma once

#include "kernels/multi_stream_attention/multi_stream_attention.h"

namespace u4d {

U4D_KERNEL Status multi_stream_attention_grad_cuda(
    void* stream, const uint16_t* grad, const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint16_t* out,
    const float* lse, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, int64_t grad_clip_stride,
    int64_t grad_token_stride, int64_t grad_head_stride, int64_t q_clip_stride, int64_t q_token_stride,
    int64_t q_head_stride, int64_t k_clip_stride, int64_t k_token_stride, int64_t k_head_stride, int64_t v_clip_stride,
    int64_t v_token_stride, int64_t v_head_stride, int64_t group_size, const uint8_t* mask, int64_t mask_clip_stride,
    int64_t mask_query_stride, int64_t mask_key_stride, int32_t* plan, int32_t* key_plan, float* facts,
    uint16_t* q_grad, uint16_t* k_grad, uint16_t* v_grad);

}  // namespace u4d
