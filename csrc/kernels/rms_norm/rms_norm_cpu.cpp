#include "kernels/rms_norm/rms_norm.h"

#include "kernels/common/vectorise.h"
#include "kernels/rms_norm/norm_rows.h"

namespace u4d {
namespace {

using namespace norm_rows;

template <class T, class W>
U4D_INLINE void normalise(const T* row, const W* weight, T* out, std::int64_t width, float eps) {
  const float inverse = inverse_rms(row, width, eps);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) round_to(to_float(row[i]) * inverse * to_float(weight[i]), out[i]);
}

// GCC clones no templates.
#define U4D_NORM_ROW(T, W)                                                                         \
  U4D_CLONES void norm_row(const T* row, const W* weight, T* out, std::int64_t width, float eps) { \
    normalise(row, weight, out, width, eps);                                                       \
  }
U4D_NORM_ROW(float, float)
U4D_NORM_ROW(Bfloat16, Bfloat16)
U4D_NORM_ROW(Bfloat16, float)
U4D_NORM_ROW(Float16, Float16)
U4D_NORM_ROW(Float16, float)
#undef U4D_NORM_ROW

template <class T, class W>
Status run(int num_threads, const T* x, const W* weight, T* out, const Sizes& sizes, float eps) {
#pragma omp parallel for num_threads(num_threads) if (sizes.rows() * sizes.width > 16384)
  for (std::int64_t i = 0; i < sizes.rows(); ++i) {
    const Row row = row_at(sizes, i);
    norm_row(x + row.offset, weight + row.stream * sizes.width, out + i * sizes.width, sizes.width, eps);
  }
  return kOk;
}

}  // namespace

Status rms_norm_cpu(int num_threads, const void* x, const void* weight, void* out, std::int64_t dtype,
                    std::int64_t weight_dtype, std::int64_t streams, std::int64_t batch, std::int64_t tokens,
                    std::int64_t width, std::int64_t stream_stride, std::int64_t batch_stride,
                    std::int64_t token_stride, double eps) {
  const Sizes sizes{streams, batch, tokens, width, stream_stride, batch_stride, token_stride};
  if (!sizes.valid()) return kInvalidArgument;
  return with_types(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    return run(num_threads, static_cast<const T*>(x), static_cast<const W*>(weight), static_cast<T*>(out), sizes,
               static_cast<float>(eps));
  });
}

}  // namespace u4d
