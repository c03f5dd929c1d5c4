#include "kernels/causal_norm_silu/causal_norm_silu.h"

#include <algorithm>

#include "kernels/causal_norm_silu/channel_rows.h"
#include "kernels/common/exponential.h"
#include "kernels/common/vectorise.h"

namespace u4d {
namespace {

using namespace channel_rows;

// One row: its sum is taken twice, since a row is in the cache the second time; a residual's is read back from `total`.
template <bool kBias, bool kResidual, class T, class W>
U4D_INLINE void sum_norm_activate(const T* x, const T* residual, const W* gamma, const W* bias, T* total, T* normed,
                                  int width) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int i = 0; i < width; ++i) {
    float value = to_float(x[i]) + (kBias ? to_float(bias[i]) : 0.0f);
    if constexpr (kResidual) value = rounded(value + to_float(residual[i]), total[i]);
    squares += value * value;
  }
  const float inverse = inverse_norm(squares, width);
#pragma GCC ivdep
  for (int i = 0; i < width; ++i) {
    const float value = kResidual ? to_float(total[i]) : to_float(x[i]) + (kBias ? to_float(bias[i]) : 0.0f);
    const float scaled = value * inverse * to_float(gamma[i]);
    round_to(scaled / (1.0f + exponential(-scaled)), normed[i]);
  }
}

template <class T, class W>
U4D_INLINE void row_of_any_kind(const T* x, const T* residual, const W* gamma, const W* bias, T* total, T* normed,
                                int width) {
  if (residual && bias) return sum_norm_activate<true, true>(x, residual, gamma, bias, total, normed, width);
  if (residual) return sum_norm_activate<false, true>(x, residual, gamma, bias, total, normed, width);
  if (bias) return sum_norm_activate<true, false>(x, residual, gamma, bias, total, normed, width);
  sum_norm_activate<false, false>(x, residual, gamma, bias, total, normed, width);
}

// GCC clones no templates.
#define U4D_CHANNEL_ROW(T, W)                                                                                         \
  U4D_CLONES void row(const T* x, const T* residual, const W* gamma, const W* bias, T* total, T* normed, int width) { \
    row_of_any_kind(x, residual, gamma, bias, total, normed, width);                                                  \
  }
U4D_CHANNEL_ROW(float, float)
U4D_CHANNEL_ROW(Bfloat16, Bfloat16)
U4D_CHANNEL_ROW(Bfloat16, float)
U4D_CHANNEL_ROW(Float16, Float16)
U4D_CHANNEL_ROW(Float16, float)
#undef U4D_CHANNEL_ROW

template <class T, class W>
void copy_front(const Arguments<T, W>& given) {
  const std::int64_t front = given.front * given.width, whole = front + given.rows * given.width;
  for (std::int64_t clip = 0; clip < given.batch; ++clip) {
    T* to = given.normed + clip * whole;
    if (given.before) {
      std::copy_n(given.before + clip * front, front, to);
    } else {
      std::fill_n(to, front, T{});
    }
  }
}

template <class T, class W>
Status run(int num_threads, const Arguments<T, W>& given) {
  if (given.empty()) return kOk;
  copy_front(given);
#pragma omp parallel for num_threads(num_threads) if (given.batch * given.rows * given.width > 4096)
  for (std::int64_t at = 0; at < given.batch * given.rows; ++at) {
    const std::int64_t from = at * given.width;
    const std::int64_t to = (at + (at / given.rows + 1) * given.front) * given.width;
    row(given.x + from, given.residual ? given.residual + from : nullptr, given.gamma, given.bias,
        given.residual ? given.total + from : nullptr, given.normed + to, given.width);
  }
  return kOk;
}

}  // namespace

Status causal_norm_silu_cpu(int num_threads, const void* x, const void* residual, const void* before, const void* gamma,
                            const void* bias, void* total, void* normed, std::int64_t dtype, std::int64_t weight_dtype,
                            std::int64_t batch, std::int64_t rows, std::int64_t front, std::int64_t width) {
  return with_arguments(x, residual, before, gamma, bias, total, normed, dtype, weight_dtype, batch, rows, front, width,
                        [&](const auto& given) { return run(num_threads, given); });
}

}  // namespace u4d
