#include "kernels/bias_gelu_fp8/bias_gelu_fp8.h"

#include "kernels/bias_gelu/gelu.cuh"
#include "kernels/quantize_rows/quantize_kernel.cuh"

namespace u4d {
namespace {

template <class T, class B>
struct ActivatedRows {
  const T* x;
  const B* bias;
  std::uint32_t rows;  // of a stream

  template <bool kVectors>
  __device__ __forceinline__ frame_rows::Chunk load(std::int64_t row, int first, int width) const {
    return frame_rows::load_chunk<kVectors>(x + row * width, first, width);
  }

  template <bool kVectors>
  __device__ __forceinline__ void finish(frame_rows::Chunk& chunk, std::int64_t row, int first, int width) const {
    const std::int64_t stream = static_cast<std::uint32_t>(row) / rows;
    const frame_rows::Chunk biases = frame_rows::load_chunk<kVectors>(bias + stream * width, first, width);
#pragma unroll
    for (int i = 0; i < frame_rows::kChunk; ++i) chunk.values[i] = gelu(chunk.values[i] + biases.values[i]);
  }
};

template <class T, class B>
Status launch(void* stream, const T* x, const B* bias, E4m3* values, float* scale, std::int64_t streams,
              std::int64_t rows, std::int64_t width) {
  const ActivatedRows<T, B> source{x, bias, static_cast<std::uint32_t>(rows)};
  const bool vectors = takes_vectors(x, width) && takes_vectors(bias, width);
  return quantized::launch(stream, source, vectors, values, scale, streams * rows, width);
}

}  // namespace

Status bias_gelu_fp8_cuda(void* stream, const void* x, const void* bias, E4m3* values, float* scale, std::int64_t dtype,
                          std::int64_t bias_dtype, std::int64_t streams, std::int64_t rows, std::int64_t width) {
  if (streams < 0 || rows < 0 || (bias_dtype != dtype && bias_dtype != kFloat32)) return kInvalidArgument;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    if (bias_dtype == kFloat32) {
      return launch(stream, from, static_cast<const float*>(bias), values, scale, streams, rows, width);
    }
    return launch(stream, from, static_cast<const T*>(bias), values, scale, streams, rows, width);
  });
}

}  // namespace u4d
