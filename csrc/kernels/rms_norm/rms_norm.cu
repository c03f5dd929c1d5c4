#include "kernels/rms_norm/rms_norm.h"

#include "kernels/rms_norm/norm_rows.cuh"

namespace u4d {

Status rms_norm_cuda(void* stream, const void* x, const void* weight, void* out, std::int64_t dtype,
                     std::int64_t weight_dtype, std::int64_t streams, std::int64_t batch, std::int64_t tokens,
                     std::int64_t width, std::int64_t stream_stride, std::int64_t batch_stride,
                     std::int64_t token_stride, double eps) {
  const norm_rows::Sizes sizes{streams, batch, tokens, width, stream_stride, batch_stride, token_stride};
  if (!sizes.valid()) return kInvalidArgument;
  return norm_rows::with_types(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    return norm_rows::launch_rows<T, W, false>(stream, static_cast<const T*>(x), static_cast<const W*>(weight), nullptr,
                                               nullptr, static_cast<T*>(out), sizes, 0, eps);
  });
}

}  // namespace u4d
