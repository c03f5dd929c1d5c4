// The backward pass. A thread owns 16 bytes of columns (or one column) and walks down a part of a stream's rows, so
// that the bias' gradient is added up in registers; threads do not wait for each other.
#include "kernels/bias_gelu/bias_gelu.h"
#include "kernels/bias_gelu/gelu_slope.h"

#include "kernels/common/launch.h"

namespace u4d {
namespace {

constexpr int kThreads = 128;

struct Sizes {
  std::int64_t streams, rows, width, parts, rows_per_part;
  int column_blocks;
};

__device__ __forceinline__ float gelu_slope_at(float v) {
  v = where_gelu_bends(v);
  const float t = expf(gelu_exponent(v));
  return gelu_slope(v, t, __fdividef(1.0f, 1.0f + t));
}

template <class T, bool kVectors>
__global__ __launch_bounds__(kThreads) void grad_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                                                        const float* __restrict__ bias, T* __restrict__ grad_x,
                                                        float* __restrict__ partials, const Sizes sizes) {
  constexpr int kSize = kVectors ? Vector<T>::kSize : 1;
  const std::uint32_t columns = static_cast<std::uint32_t>(sizes.column_blocks);
  const std::uint32_t task = blockIdx.x / columns, streams = static_cast<std::uint32_t>(sizes.streams);
  const std::int64_t part = task / streams, stream = task % streams;
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.x % columns) * kThreads + threadIdx.x) * kSize;
  if (column >= sizes.width) return;
  const std::int64_t first = part * sizes.rows_per_part, last = min(first + sizes.rows_per_part, sizes.rows);

  float biases[kSize], sums[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    biases[i] = bias[stream * sizes.width + column + i];
    sums[i] = 0.0f;
  }
#pragma unroll 4
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t at = (stream * sizes.rows + row) * sizes.width + column;
    if constexpr (kVectors) {
      const Vector<T> grads = load_vector(grad + at), values = load_vector(x + at);
      Vector<T> result;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float slope = to_float(grads.values[i]) * gelu_slope_at(to_float(values.values[i]) + biases[i]);
        sums[i] += slope;
        round_to(slope, result.values[i]);
      }
      store_vector(grad_x + at, result);
    } else {
      const float slope = to_float(grad[at]) * gelu_slope_at(to_float(x[at]) + biases[0]);
      sums[0] += slope;
      round_to(slope, grad_x[at]);
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) partials[static_cast<std::int64_t>(task) * sizes.width + column + i] = sums[i];
}

template <class T>
Status launch(void* stream, const T* grad, const T* x, const float* bias, T* grad_x, float* partials, Sizes sizes) {
  const bool vectors =
      takes_vectors(grad, sizes.width) && takes_vectors(x, sizes.width) && takes_vectors(grad_x, sizes.width);
  const std::int64_t columns = vectors ? sizes.width / Vector<T>::kSize : sizes.width;
  if (columns > INT32_MAX) return kTooLarge;
  sizes.column_blocks = static_cast<int>(blocks_for(columns, kThreads));
  const std::int64_t grid = sizes.streams * sizes.parts * sizes.column_blocks;
  if (grid == 0) return kOk;
  if (grid > INT32_MAX) return kTooLarge;
  if (vectors) {
    U4D_LAUNCH((grad_kernel<T, true>), static_cast<unsigned int>(grid), kThreads, 0, stream, grad, x, bias, grad_x,
               partials, sizes);
  } else {
    U4D_LAUNCH((grad_kernel<T, false>), static_cast<unsigned int>(grid), kThreads, 0, stream, grad, x, bias, grad_x,
               partials, sizes);
  }
  return launch_status();
}

}  // namespace

Status bias_gelu_grad_cuda(void* stream, const void* grad, const void* x, const float* bias, void* grad_x,
                           float* partials, std::int64_t dtype, std::int64_t streams, std::int64_t rows,
                           std::int64_t width, std::int64_t rows_per_part) {
  if (streams < 0 || rows < 0 || width < 0 || rows_per_part < 1) return kInvalidArgument;
  const Sizes sizes{streams, rows, width, (rows + rows_per_part - 1) / rows_per_part, rows_per_part, 0};
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(stream, static_cast<const T*>(grad), static_cast<const T*>(x), bias, static_cast<T*>(grad_x),
                  partials, sizes);
  });
}

}  // namespace u4d
