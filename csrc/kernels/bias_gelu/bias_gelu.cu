#include "kernels/bias_gelu/bias_gelu.h"

#include "kernels/bias_gelu/gelu.cuh"
#include "kernels/common/launch.h"

namespace u4d {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ __forceinline__ T activate(T x, float bias) {
  T out;
  round_to(gelu(to_float(x) + bias), out);
  return out;
}

// One thread per 16 bytes of x (kVectors: all rows are aligned and whole vectors), or per element.
template <class T, class B, bool kVectors>
__global__ __launch_bounds__(kThreads) void activate_kernel(const T* x, const B* bias, T* out, std::uint32_t work,
                                                            std::uint32_t work_per_row, std::uint32_t rows) {
  const std::uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= work) return;
  const std::uint32_t row = at / work_per_row;
  const std::uint32_t column = at - row * work_per_row;
  const std::int64_t bias_row = static_cast<std::int64_t>(row / rows) * work_per_row;
  if constexpr (kVectors) {
    constexpr int kSize = Vector<T>::kSize, kBiasSize = Vector<B>::kSize;
    static_assert(kSize % kBiasSize == 0);
    const Vector<T> vector = load_vector(x + static_cast<std::int64_t>(at) * kSize);
    const B* from = bias + (bias_row + column) * kSize;
    Vector<T> activated;
#pragma unroll
    for (int part = 0; part < kSize; part += kBiasSize) {
      const Vector<B> biases = load_vector(from + part);
#pragma unroll
      for (int i = 0; i < kBiasSize; ++i) {
        activated.values[part + i] = activate(vector.values[part + i], to_float(biases.values[i]));
      }
    }
    store_vector(out + static_cast<std::int64_t>(at) * kSize, activated);
  } else {
    out[at] = activate(x[at], to_float(bias[bias_row + column]));
  }
}

template <class T, class B>
Status launch(void* stream, const T* x, const B* bias, T* out, std::int64_t streams, std::int64_t rows,
              std::int64_t width) {
  const bool vectors = takes_vectors(x, width) && takes_vectors(out, width) && takes_vectors(bias, width);
  const std::int64_t work_per_row = vectors ? width / Vector<T>::kSize : width;
  const std::int64_t work = streams * rows * work_per_row;
  if (work == 0) return kOk;
  if (work > INT32_MAX) return kTooLarge;
  const unsigned int grid = blocks_for(work, kThreads);
  const std::uint32_t count = static_cast<std::uint32_t>(work), per_row = static_cast<std::uint32_t>(work_per_row),
                      rows_per_stream = static_cast<std::uint32_t>(rows);
  if (vectors) {
    U4D_LAUNCH((activate_kernel<T, B, true>), grid, kThreads, 0, stream, x, bias, out, count, per_row, rows_per_stream);
  } else {
    U4D_LAUNCH((activate_kernel<T, B, false>), grid, kThreads, 0, stream, x, bias, out, count, per_row,
               rows_per_stream);
  }
  return launch_status();
}

}  // namespace

Status bias_gelu_cuda(void* stream, const void* x, const void* bias, void* out, std::int64_t dtype,
                      std::int64_t bias_dtype, std::int64_t streams, std::int64_t rows, std::int64_t width) {
  if (streams < 0 || rows < 0 || width < 0 || (bias_dtype != dtype && bias_dtype != kFloat32)) return kInvalidArgument;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    if (bias_dtype == kFloat32) return launch(stream, from, static_cast<const float*>(bias), to, streams, rows, width);
    return launch(stream, from, static_cast<const T*>(bias), to, streams, rows, width);
  });
}

}  // namespace u4d
