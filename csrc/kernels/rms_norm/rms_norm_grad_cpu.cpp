#include <algorithm>

#include "kernels/common/vectorise.h"
#include "kernels/rms_norm/norm_rows.h"
#include "kernels/rms_norm/rms_norm.h"

namespace u4d {
namespace {

using namespace norm_rows;

template <class T>
U4D_INLINE void row_grad(const T* grad, const T* x, const float* weight, T* grad_x, float* sums, std::int64_t width,
                         float eps) {
  const float inverse = inverse_rms(x, width, eps);
  float products = 0.0f;
#pragma omp simd reduction(+ : products)
  for (std::int64_t i = 0; i < width; ++i) products += to_float(grad[i]) * weight[i] * to_float(x[i]);
  const float back = products * inverse * inverse / static_cast<float>(width);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) {
    const float value = to_float(x[i]), slope = to_float(grad[i]);
    sums[i] += slope * (value * inverse);
    round_to((weight[i] * slope - value * back) * inverse, grad_x[i]);
  }
}

// GCC clones no templates.
U4D_CLONES void row_of_grads(const float* grad, const float* x, const float* weight, float* grad_x, float* sums,
                             std::int64_t width, float eps) {
  row_grad(grad, x, weight, grad_x, sums, width, eps);
}
U4D_CLONES void row_of_grads(const Bfloat16* grad, const Bfloat16* x, const float* weight, Bfloat16* grad_x,
                             float* sums, std::int64_t width, float eps) {
  row_grad(grad, x, weight, grad_x, sums, width, eps);
}
U4D_CLONES void row_of_grads(const Float16* grad, const Float16* x, const float* weight, Float16* grad_x, float* sums,
                             std::int64_t width, float eps) {
  row_grad(grad, x, weight, grad_x, sums, width, eps);
}

template <class T>
Status run(int num_threads, const T* grad, const T* x, const float* weight, T* grad_x, float* partial,
           const Sizes& sizes, std::int64_t chunks, float eps) {
  const std::int64_t rows = sizes.batch * sizes.tokens, width = sizes.width;
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * width > 16384)
  for (std::int64_t task = 0; task < chunks * sizes.streams; ++task) {
    const std::int64_t stream = task % sizes.streams, chunk = task / sizes.streams;
    float* sums = partial + task * width;
    std::fill_n(sums, width, 0.0f);
    const std::int64_t first = stream * rows + chunk_begin(rows, chunk, chunks);
    const std::int64_t last = stream * rows + chunk_begin(rows, chunk + 1, chunks);
    for (std::int64_t i = first; i < last; ++i) {
      row_of_grads(grad + i * width, x + row_at(sizes, i).offset, weight + stream * width, grad_x + i * width, sums,
                   width, eps);
    }
  }
  return kOk;
}

}  // namespace

Status rms_norm_grad_cpu(int num_threads, const void* grad, const void* x, const float* weight, void* grad_x,
                         float* partial, std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                         std::int64_t tokens, std::int64_t width, std::int64_t stream_stride, std::int64_t batch_stride,
                         std::int64_t token_stride, std::int64_t chunks, double eps) {
  const Sizes sizes{streams, batch, tokens, width, stream_stride, batch_stride, token_stride};
  if (!sizes.valid() || sizes.rows() == 0 || width == 0 || chunks < 1) return kInvalidArgument;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return run(num_threads, static_cast<const T*>(grad), static_cast<const T*>(x), weight, static_cast<T*>(grad_x),
               partial, sizes, chunks, static_cast<float>(eps));
  });
}

}  // namespace u4d
