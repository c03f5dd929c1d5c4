#include "kernels/qk_norm_rope_fp8/qk_norm_rope_fp8.h"

#include "kernels/common/vectorise.h"
#include "kernels/qk_norm_rope/turned_pair_cpu.h"
#include "kernels/rms_norm/norm_rows.h"

namespace u4d {
namespace {

using namespace norm_rows;

// One head's channels, computed once for their largest and once again to be written; returns their scale.
template <class T, class W>
U4D_INLINE float quantize_head(const T* x, const W* weight, const float* cos, const float* sin, E4m3* values,
                               std::int64_t pairs, float inverse) {
  std::uint32_t largest = 0;
  for (std::int64_t p = 0; p < pairs; ++p) {
    const Pair turned = turned_pair(x, weight, cos, sin, p, inverse);
    const std::uint32_t even = magnitude_bits(turned.even), odd = magnitude_bits(turned.odd);
    const std::uint32_t larger = even > odd ? even : odd;
    largest = larger > largest ? larger : largest;
  }
  const float scale = scale_of_row(largest), factor = 1.0f / scale;
#pragma GCC ivdep
  for (std::int64_t p = 0; p < pairs; ++p) {
    const Pair turned = turned_pair(x, weight, cos, sin, p, inverse);
    round_to(turned.even * factor, values[2 * p]);
    round_to(turned.odd * factor, values[2 * p + 1]);
  }
  return scale;
}

template <class T, class W>
U4D_INLINE void quantize_heads(const T* row, const W* weight, const float* cos, const float* sin, E4m3* values,
                               float* scale, std::int64_t heads, std::int64_t head_dim, float eps) {
  const float inverse = inverse_rms(row, heads * head_dim, eps);
  for (std::int64_t head = 0; head < heads; ++head) {
    const std::int64_t first = head * head_dim;
    scale[head] = quantize_head(row + first, weight + first, cos, sin, values + first, head_dim / 2, inverse);
  }
}

// GCC clones no templates.
#define U4D_QK_ROW(T, W)                                                                                  \
  U4D_CLONES void qk_row(const T* row, const W* weight, const float* cos, const float* sin, E4m3* values, \
                         float* scale, std::int64_t heads, std::int64_t head_dim, float eps) {            \
    quantize_heads(row, weight, cos, sin, values, scale, heads, head_dim, eps);                           \
  }
U4D_QK_ROW(float, float)
U4D_QK_ROW(Bfloat16, Bfloat16)
U4D_QK_ROW(Bfloat16, float)
U4D_QK_ROW(Float16, Float16)
U4D_QK_ROW(Float16, float)
#undef U4D_QK_ROW

template <class T, class W>
Status run(int num_threads, const T* x, const W* weight, const float* cos, const float* sin, E4m3* values, float* scale,
           const Sizes& sizes, std::int64_t heads, std::int64_t head_dim, float eps) {
  const std::int64_t pairs = head_dim / 2;
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * sizes.width > 16384)
  for (std::int64_t i = 0; i < sizes.rows(); ++i) {
    const Row row = row_at(sizes, i);
    qk_row(x + row.offset, weight + row.stream * sizes.width, cos + row.token * pairs, sin + row.token * pairs,
           values + row.in_attention * sizes.width, scale + row.in_attention * heads, heads, head_dim, eps);
  }
  return kOk;
}

}  // namespace

Status qk_norm_rope_fp8_cpu(int num_threads, const void* x, const void* weight, const float* cos, const float* sin,
                            E4m3* values, float* scale, std::int64_t dtype, std::int64_t weight_dtype,
                            std::int64_t streams, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                            std::int64_t head_dim, std::int64_t stream_stride, std::int64_t batch_stride,
                            std::int64_t token_stride, double eps) {
  const Sizes sizes{streams, batch, tokens, heads * head_dim, stream_stride, batch_stride, token_stride};
  if (!sizes.valid() || heads < 1 || head_dim < 2 || head_dim % 2 != 0) return kInvalidArgument;
  return with_types(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    return run(num_threads, static_cast<const T*>(x), static_cast<const W*>(weight), cos, sin, values, scale, sizes,
               heads, head_dim, static_cast<float>(eps));
  });
}

}  // namespace u4d
