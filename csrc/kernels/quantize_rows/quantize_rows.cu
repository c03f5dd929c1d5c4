#include "kernels/quantize_rows/quantize_rows.h"

#include "kernels/quantize_rows/quantize_kernel.cuh"

namespace u4d {
namespace {

template <class T>
struct Rows {
  const T* x;

  template <bool kVectors>
  __device__ __forceinline__ frame_rows::Chunk load(std::int64_t row, int first, int width) const {
    return frame_rows::load_chunk<kVectors>(x + row * width, first, width);
  }
  template <bool kVectors>
  __device__ __forceinline__ void finish(frame_rows::Chunk&, std::int64_t, int, int) const {}
};

}  // namespace

Status quantize_rows_cuda(void* stream, const void* x, E4m3* values, float* scale, std::int64_t dtype,
                          std::int64_t rows, std::int64_t width) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    return quantized::launch(stream, Rows<T>{from}, takes_vectors(from, width), values, scale, rows, width);
  });
}

}  // namespace u4d
