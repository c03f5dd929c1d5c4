#include "kernels/rms_norm/norm_rows_grad.cuh"
#include "kernels/rms_norm/rms_norm.h"

namespace u4d {

Status rms_norm_grad_cuda(void* stream, const void* grad, const void* x, const float* weight, void* grad_x,
                          float* partial, std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                          std::int64_t tokens, std::int64_t width, std::int64_t stream_stride,
                          std::int64_t batch_stride, std::int64_t token_stride, std::int64_t chunks, double eps) {
  const norm_rows::Sizes sizes{streams, batch, tokens, width, stream_stride, batch_stride, token_stride};
  if (!sizes.valid()) return kInvalidArgument;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return norm_rows::launch_rows_grad<T, false>(stream, static_cast<const T*>(grad), static_cast<const T*>(x), weight,
                                                 nullptr, nullptr, static_cast<T*>(grad_x), partial, sizes, 0, chunks,
                                                 eps);
  });
}

}  // namespace u4d
