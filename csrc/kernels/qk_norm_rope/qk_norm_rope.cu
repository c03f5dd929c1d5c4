#include "kernels/qk_norm_rope/qk_norm_rope.h"

#include "kernels/rms_norm/norm_rows.cuh"

namespace u4d {

Status qk_norm_rope_cuda(void* stream, const void* x, const void* weight, const float* cos, const float* sin, void* out,
                         std::int64_t dtype, std::int64_t weight_dtype, std::int64_t streams, std::int64_t batch,
                         std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, std::int64_t stream_stride,
                         std::int64_t batch_stride, std::int64_t token_stride, double eps) {
  const norm_rows::Sizes sizes{streams, batch, tokens, heads * head_dim, stream_stride, batch_stride, token_stride};
  if (!sizes.valid() || heads < 1 || head_dim % 2 != 0) return kInvalidArgument;
  return norm_rows::with_types(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    return norm_rows::launch_rows<T, W, true>(stream, static_cast<const T*>(x), static_cast<const W*>(weight), cos, sin,
                                              static_cast<T*>(out), sizes, head_dim, eps);
  });
}

}  // namespace u4d
