#include <algorithm>

#include "kernels/bias_gelu/bias_gelu.h"
#include "kernels/bias_gelu/gelu_slope.h"
#include "kernels/common/exponential.h"
#include "kernels/common/vectorise.h"

namespace u4d {
namespace {

template <class T>
U4D_INLINE void row_grad(const T* grad, const T* x, const float* bias, T* grad_x, float* sums, std::int64_t width) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) {
    const float v = where_gelu_bends(to_float(x[i]) + bias[i]), t = exponential(gelu_exponent(v));
    const float slope = to_float(grad[i]) * gelu_slope(v, t, 1.0f / (1.0f + t));
    sums[i] += slope;
    round_to(slope, grad_x[i]);
  }
}

// GCC clones no templates.
#define U4D_ROW_OF_GRADS(T)                                                                          \
  U4D_CLONES void row_of_grads(const T* grad, const T* x, const float* bias, T* grad_x, float* sums, \
                               std::int64_t width) {                                                 \
    row_grad(grad, x, bias, grad_x, sums, width);                                                    \
  }
U4D_ROW_OF_GRADS(float)
U4D_ROW_OF_GRADS(Bfloat16)
U4D_ROW_OF_GRADS(Float16)
#undef U4D_ROW_OF_GRADS

template <class T>
Status run(int num_threads, const T* grad, const T* x, const float* bias, T* grad_x, float* partials,
           std::int64_t streams, std::int64_t rows, std::int64_t width, std::int64_t rows_per_part) {
  const std::int64_t parts = (rows + rows_per_part - 1) / rows_per_part;
#pragma omp parallel for num_threads(num_threads) if (streams * rows * width > 4096)
  for (std::int64_t task = 0; task < parts * streams; ++task) {
    const std::int64_t stream = task % streams, first = task / streams * rows_per_part;
    float* sums = partials + task * width;
    std::fill_n(sums, width, 0.0f);
    for (std::int64_t row = first; row < std::min(first + rows_per_part, rows); ++row) {
      const std::int64_t at = (stream * rows + row) * width;
      row_of_grads(grad + at, x + at, bias + stream * width, grad_x + at, sums, width);
    }
  }
  return kOk;
}

}  // namespace

Status bias_gelu_grad_cpu(int num_threads, const void* grad, const void* x, const float* bias, void* grad_x,
                          float* partials, std::int64_t dtype, std::int64_t streams, std::int64_t rows,
                          std::int64_t width, std::int64_t rows_per_part) {
  if (streams < 0 || rows < 0 || width < 0 || rows_per_part < 1) return kInvalidArgument;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return run(num_threads, static_cast<const T*>(grad), static_cast<const T*>(x), bias, static_cast<T*>(grad_x),
               partials, streams, rows, width, rows_per_part);
  });
}

}  // namespace u4d
