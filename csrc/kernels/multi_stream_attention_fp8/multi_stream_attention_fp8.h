// Softmax attention over groups from 8-bit numbers, for Hopper (sm_90a). Specification:
// u4d_fast/reference/multi_stream_attention_fp8.py.
//
// First multi_stream_attention_fp8_quantize_cuda():
//   q, k, v, group_size, mask   as for multi_stream_attention (multi_stream_attention.h)
//   seen        bytes [batch, groups], scratch; written only where the mask has a query stride other than 0
//   extents     uint32 [batch, heads, attention_slices(tokens), 3], scratch
//   q_values    e4m3 [batch, tokens, heads, head_dim], q_scale float32 [batch, heads, tokens]: q ~ values * scale, the
//               scale a row's largest magnitude / 448 (common/e4m3.h)
//   k_values    e4m3 [batch, tokens, heads, head_dim]
//   v_values    e4m3 [batch, heads, head_dim, attention_padded(tokens)]: a row for each channel, the keys of each
//               aligned 16 in the order of attention_key_at(); zeros after the last key
//   head_scales float32 [batch, heads, 3]: of k; of v; and 0 where all of the head's v is finite, else 1
// The scales of a head are its largest finite magnitudes / 448. Infinity becomes NaN, which e4m3 has. Groups that
// nobody sees are not read, do not count for the scales and stand as zeros.
//
// Then multi_stream_attention_fp8_cuda(): group_size, mask, plan, out, lse as for multi_stream_attention. Weights are
// rounded to e4m3 where they meet v, as 256 times what they are, so that small ones keep their bits. Their sum is that
// of the weights before they are rounded, in float32: it costs no conversion back, lse is that of the scores, and the
// rounding errors, being of either sign, average out over the keys. Products with v are summed by the tensor cores for
// a tile of 128 keys, which cut sums off at about 14 bits, and then in float32.
//
// At most 65,535 clips. Every element of the outputs is written. Nothing is allocated and nothing waited for. The same
// input gives the same bits.
#pragma once

#include <cstdint>

#include "kernels/common/e4m3.h"
#include "kernels/common/status.h"

namespace u4d {

// Tokens that a block of the first step works on.
constexpr int kAttentionSlice = 128;

constexpr int64_t attention_slices(int64_t tokens) { return (tokens + kAttentionSlice - 1) / kAttentionSlice; }
constexpr int64_t attention_padded(int64_t tokens) { return (tokens + 15) / 16 * 16; }

// Which of 16 neighbouring keys stands at a place. The product Q K^T leaves to thread q (of four) its columns, the
// product P V takes from it the columns of the same letters:
//
//   keys     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
//   Q K^T    a  a  b  b  c  c  d  d  a  a  b  b  c  c  d  d
//   P V      a  a  a  a  b  b  b  b  c  c  c  c  d  d  d  d
//
// so with the values in this order the weights never leave their thread: 0 1 8 9 | 2 3 10 11 | 4 5 12 13 | 6 7 14 15.
U4D_HD constexpr int attention_key_at(int place) { return place / 4 * 2 + place % 4 / 2 * 8 + place % 2; }
U4D_HD constexpr int attention_place_of(int key) { return key % 8 / 2 * 4 + key / 8 * 2 + key % 2; }

U4D_KERNEL Status multi_stream_attention_fp8_quantize_cuda(
    void* stream, const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t batch, int64_t tokens, int64_t heads,
    int64_t head_dim, int64_t q_clip_stride, int64_t q_token_stride, int64_t q_head_stride, int64_t k_clip_stride,
    int64_t k_token_stride, int64_t k_head_stride, int64_t v_clip_stride, int64_t v_token_stride, int64_t v_head_stride,
    int64_t group_size, const uint8_t* mask, int64_t mask_clip_stride, int64_t mask_query_stride,
    int64_t mask_key_stride, uint8_t* seen, uint32_t* extents, E4m3* q_values, float* q_scale, E4m3* k_values,
    E4m3* v_values, float* head_scales);

U4D_KERNEL Status multi_stream_attention_fp8_cuda(void* stream, const E4m3* q_values, const float* q_scale,
                                                  const E4m3* k_values, const E4m3* v_values, const float* head_scales,
                                                  int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                                                  int64_t group_size, const uint8_t* mask, int64_t mask_clip_stride,
                                                  int64_t mask_query_stride, int64_t mask_key_stride, int32_t* plan,
                                                  uint16_t* out, float* lse);

}  // namespace u4d
