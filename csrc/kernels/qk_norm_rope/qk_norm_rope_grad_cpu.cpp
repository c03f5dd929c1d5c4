#include <algorithm>

#include "kernels/common/vectorise.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/norm_rows.h"

namespace u4d {
namespace {

using namespace norm_rows;

// A gradient pair, turned back by the angle that the forward pass turned by.
struct Pair {
  float even, odd;
};

template <class T>
U4D_INLINE Pair turned_back(const T* grad, float cos, float sin) {
  const float even = to_float(grad[0]), odd = to_float(grad[1]);
  return {even * cos + odd * sin, odd * cos - even * sin};
}

template <class T>
U4D_INLINE void row_grad(const T* grad, const T* x, const float* weight, const float* cos, const float* sin, T* grad_x,
                         float* sums, std::int64_t heads, std::int64_t head_dim, float eps) {
  const std::int64_t width = heads * head_dim, pairs = head_dim / 2;
  const float inverse = inverse_rms(x, width, eps);
  float products = 0.0f;
  for (std::int64_t first = 0; first < width; first += head_dim) {
    const T *head = x + first, *head_grad = grad + first;
    const float* scale = weight + first;
#pragma omp simd reduction(+ : products)
    for (std::int64_t p = 0; p < pairs; ++p) {
      const Pair slope = turned_back(head_grad + 2 * p, cos[p], sin[p]);
      products += slope.even * scale[2 * p] * to_float(head[2 * p]);
      products += slope.odd * scale[2 * p + 1] * to_float(head[2 * p + 1]);
    }
  }
  const float back = products * inverse * inverse / static_cast<float>(width);
  for (std::int64_t first = 0; first < width; first += head_dim) {
    const T *head = x + first, *head_grad = grad + first;
    const float* scale = weight + first;
    float* head_sums = sums + first;
    T* to = grad_x + first;
#pragma GCC ivdep
    for (std::int64_t p = 0; p < pairs; ++p) {
      const Pair slope = turned_back(head_grad + 2 * p, cos[p], sin[p]);
      const float even = to_float(head[2 * p]), odd = to_float(head[2 * p + 1]);
      head_sums[2 * p] += slope.even * (even * inverse);
      head_sums[2 * p + 1] += slope.odd * (odd * inverse);
      round_to((scale[2 * p] * slope.even - even * back) * inverse, to[2 * p]);
      round_to((scale[2 * p + 1] * slope.odd - odd * back) * inverse, to[2 * p + 1]);
    }
  }
}

// GCC clones no templates.
#define U4D_QK_ROW_GRAD(T)                                                                                         \
  U4D_CLONES void row_of_grads(const T* grad, const T* x, const float* weight, const float* cos, const float* sin, \
                               T* grad_x, float* sums, std::int64_t heads, std::int64_t head_dim, float eps) {     \
    row_grad(grad, x, weight, cos, sin, grad_x, sums, heads, head_dim, eps);                                       \
  }
U4D_QK_ROW_GRAD(float)
U4D_QK_ROW_GRAD(Bfloat16)
U4D_QK_ROW_GRAD(Float16)
#undef U4D_QK_ROW_GRAD

template <class T>
Status run(int num_threads, const T* grad, const T* x, const float* weight, const float* cos, const float* sin,
           T* grad_x, float* partial, const Sizes& sizes, std::int64_t heads, std::int64_t head_dim,
           std::int64_t chunks, float eps) {
  const std::int64_t rows = sizes.batch * sizes.tokens, width = sizes.width, pairs = head_dim / 2;
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * width > 16384)
  for (std::int64_t task = 0; task < chunks * sizes.streams; ++task) {
    const std::int64_t stream = task % sizes.streams, chunk = task / sizes.streams;
    float* sums = partial + task * width;
    std::fill_n(sums, width, 0.0f);
    const std::int64_t first = stream * rows + chunk_begin(rows, chunk, chunks);
    const std::int64_t last = stream * rows + chunk_begin(rows, chunk + 1, chunks);
    for (std::int64_t i = first; i < last; ++i) {
      const Row row = row_at(sizes, i);
      row_of_grads(grad + row.in_attention * width, x + row.offset, weight + stream * width, cos + row.token * pairs,
                   sin + row.token * pairs, grad_x + i * width, sums, heads, head_dim, eps);
    }
  }
  return kOk;
}

}  // namespace

Status qk_norm_rope_grad_cpu(int num_threads, const void* grad, const void* x, const float* weight, const float* cos,
                             const float* sin, void* grad_x, float* partial, std::int64_t dtype, std::int64_t streams,
                             std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
                             std::int64_t stream_stride, std::int64_t batch_stride, std::int64_t token_stride,
                             std::int64_t chunks, double eps) {
  const Sizes sizes{streams, batch, tokens, heads * head_dim, stream_stride, batch_stride, token_stride};
  if (!sizes.valid() || heads < 1 || head_dim % 2 != 0) return kInvalidArgument;
  if (sizes.rows() == 0 || sizes.width == 0 || chunks < 1) return kInvalidArgument;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return run(num_threads, static_cast<const T*>(grad), static_cast<const T*>(x), weight, cos, sin,
               static_cast<T*>(grad_x), partial, sizes, heads, head_dim, chunks, static_cast<float>(eps));
  });
}

}  // namespace u4d
