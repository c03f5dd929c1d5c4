// What the norms over token rows share: their sizes, their types, and a row's statistic on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/half_types.h"

namespace u4d::norm_rows {

// Activations [streams, batch, tokens, width]; strides in elements.
struct Sizes {
  std::int64_t streams, batch, tokens, width;
  std::int64_t stream_stride, batch_stride, token_stride;

  bool valid() const { return streams >= 0 && batch >= 0 && tokens >= 0 && width >= 0; }
  std::int64_t rows() const { return streams * batch * tokens; }
};

// A row by its place in memory order, and in the order of attention's layout [batch, streams, tokens].
struct Row {
  std::int64_t stream, batch, token;
  std::int64_t offset, in_attention;
};

inline Row row_at(const Sizes& sizes, std::int64_t index) {
  const std::int64_t token = index % sizes.tokens, pair = index / sizes.tokens;
  const std::int64_t batch = pair % sizes.batch, stream = pair / sizes.batch;
  const std::int64_t offset = stream * sizes.stream_stride + batch * sizes.batch_stride + token * sizes.token_stride;
  return {stream, batch, token, offset, (batch * sizes.streams + stream) * sizes.tokens + token};
}

// Calls `call(x, weight)` with values of the two types. Host code.
template <class Call>
Status with_types(std::int64_t dtype, std::int64_t weight_dtype, const Call& call) {
  if (weight_dtype != dtype && weight_dtype != kFloat32) return kInvalidArgument;
  return with_type(dtype, [&](auto x) { return weight_dtype == kFloat32 ? call(x, float{}) : call(x, x); });
}

// The rows of one stream that a chunk of them has; the same ones in the CPU and the CUDA kernel.
U4D_HD std::int64_t chunk_begin(std::int64_t rows, std::int64_t chunk, std::int64_t chunks) {
  return rows * chunk / chunks;
}

#if !defined(__CUDACC__) && !defined(U4D_HOST_SHIM)
template <class T>
U4D_INLINE float inverse_rms(const T* row, std::int64_t width, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < width; ++i) {
    const float value = to_float(row[i]);
    sum += value * value;
  }
  return 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
}
#endif

}  // namespace u4d::norm_rows
