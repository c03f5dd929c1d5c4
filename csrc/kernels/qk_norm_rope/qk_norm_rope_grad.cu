#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/norm_rows_grad.cuh"

namespace u4d {

Status qk_norm_rope_grad_cuda(void* stream, const void* grad, const void* x, const float* weight, const float* cos,
                              const float* sin, void* grad_x, float* partial, std::int64_t dtype, std::int64_t streams,
                              std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
                              std::int64_t stream_stride, std::int64_t batch_stride, std::int64_t token_stride,
                              std::int64_t chunks, double eps) {
  const norm_rows::Sizes sizes{streams, batch, tokens, heads * head_dim, stream_stride, batch_stride, token_stride};
  if (!sizes.valid() || heads < 1 || head_dim % 2 != 0) return kInvalidArgument;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return norm_rows::launch_rows_grad<T, true>(stream, static_cast<const T*>(grad), static_cast<const T*>(x), weight,
                                                cos, sin, static_cast<T*>(grad_x), partial, sizes, head_dim, chunks,
                                                eps);
  });
}

}  // namespace u4d
