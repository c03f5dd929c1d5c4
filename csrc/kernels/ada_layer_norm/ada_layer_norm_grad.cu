// The backward pass. A block takes some rows of one frame, one after the other: each of its threads owns columns, so
// that the sums over rows for shift and scale stay in registers and are written once, as one part of the frame's sum.
#include "kernels/ada_layer_norm/ada_layer_norm.h"

#include "kernels/gated_residual_norm/frame_rows.cuh"

namespace u4d {
namespace {

using namespace frame_rows;

template <class T>
struct GradArguments {
  const T *grad, *x;
  FrameTable scale;
  T* grad_x;
  float* partials;
  RowSizes sizes;
  std::int64_t parts, rows_per_part;
  float eps;
};

template <class T, int kChunks, bool kVectors>
__global__ __launch_bounds__(kThreads, 1) void grad_kernel(const GradArguments<T> a) {
  // A sum's slots are written again one row later, after barriers that all its readers have passed.
  __shared__ float slots[4][kWarps];
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int width = static_cast<int>(a.sizes.width);
  const int own = static_cast<int>(threadIdx.x) * kChunk, step = static_cast<int>(blockDim.x) * kChunk;
  const std::int64_t group = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  const std::int64_t first = part * a.rows_per_part, last = min(first + a.rows_per_part, a.sizes.patches);
  const float* scale_row = row_of(a.scale, place_of(group * a.sizes.patches, a.sizes));
  const float columns = static_cast<float>(width);

  Chunk scale[kChunks], shift_sum[kChunks], scale_sum[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    scale[c] = load_chunk<kVectors>(scale_row, own + c * step, width);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) shift_sum[c].values[i] = scale_sum[c].values[i] = 0.0f;
  }
  for (std::int64_t patch = first; patch < last; ++patch) {
    const std::int64_t at = (group * a.sizes.patches + patch) * a.sizes.width;
    Chunk x[kChunks], grad[kChunks];
    float sum = 0.0f, squares = 0.0f, grad_sum = 0.0f, along_sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      x[c] = load_chunk<kVectors>(a.x + at, own + c * step, width);
      grad[c] = load_chunk<kVectors>(a.grad + at, own + c * step, width);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum += x[c].values[i];
    }
    const float mean = sum_of_row(sum, warps, slots[0]) / columns;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x[c].values[i] = is_column<kVectors>(own + c * step, i, width) ? x[c].values[i] - mean : 0.0f;
        squares += x[c].values[i] * x[c].values[i];
      }
    }
    const float inverse = 1.0f / sqrtf(sum_of_row(squares, warps, slots[1]) / columns + a.eps);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float normed = x[c].values[i] * inverse, out = grad[c].values[i];
        shift_sum[c].values[i] += out;
        scale_sum[c].values[i] += out * normed;
        x[c].values[i] = normed;
        grad[c].values[i] = out * (1.0f + scale[c].values[i]);
        grad_sum += grad[c].values[i];
        along_sum += grad[c].values[i] * normed;
      }
    }
    const float grad_mean = sum_of_row(grad_sum, warps, slots[2]) / columns;
    const float along = sum_of_row(along_sum, warps, slots[3]) / columns;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        grad[c].values[i] = (grad[c].values[i] - grad_mean - x[c].values[i] * along) * inverse;
      }
      store_chunk<kVectors>(a.grad_x + at, own + c * step, width, grad[c]);
    }
  }
  const std::int64_t groups = a.sizes.streams * a.sizes.batch * a.sizes.frames;
  float* shift_part = a.partials + (2 * part * groups + group) * a.sizes.width;
  float* scale_part = shift_part + groups * a.sizes.width;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    store_chunk<kVectors>(shift_part, own + c * step, width, shift_sum[c]);
    store_chunk<kVectors>(scale_part, own + c * step, width, scale_sum[c]);
  }
}

template <int kChunks, bool kVectors, class T>
Status launch_grad(void* stream, const GradArguments<T>& a, int threads) {
  const std::int64_t blocks = a.sizes.streams * a.sizes.batch * a.sizes.frames * a.parts;
  if (blocks > INT32_MAX) return kTooLarge;
  U4D_LAUNCH((grad_kernel<T, kChunks, kVectors>), static_cast<unsigned int>(blocks), threads, 0, stream, a);
  return launch_status();
}

template <class T>
Status launch_grad(void* stream, const GradArguments<T>& a) {
  const std::int64_t chunks = (a.sizes.width + kChunk - 1) / kChunk;
  const int threads = static_cast<int>(chunks < kThreads ? (chunks + kWarp - 1) / kWarp * kWarp : kThreads);
  const bool vectors = a.sizes.width % kChunk == 0 && takes_vectors(a.x, a.sizes.width) &&
                       takes_vectors(a.grad, a.sizes.width) && takes_vectors(a.grad_x, a.sizes.width) &&
                       takes_vectors(a.partials, a.sizes.width) && table_takes_vectors(a.scale);
  if (!vectors) return launch_grad<kMostChunks, false>(stream, a, threads);
  if (chunks <= threads) return launch_grad<1, true>(stream, a, threads);
  if (chunks <= 2 * threads) return launch_grad<2, true>(stream, a, threads);
  return launch_grad<kMostChunks, true>(stream, a, threads);
}

}  // namespace

Status ada_layer_norm_grad_cuda(void* stream, const void* grad, const void* x, const float* scale, void* grad_x,
                                float* partials, std::int64_t dtype, std::int64_t streams, std::int64_t batch,
                                std::int64_t frames, std::int64_t patches, std::int64_t width,
                                std::int64_t scale_stream, std::int64_t scale_clip, std::int64_t scale_frame,
                                std::int64_t rows_per_part, double eps) {
  const RowSizes sizes{streams, batch, frames, patches, width};
  const Status status = check_rows(sizes);
  if (status != kOk) return status;
  if (rows_per_part < 1) return kInvalidArgument;
  if (sizes.rows() == 0) return kOk;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    GradArguments<T> a{};
    a.grad = static_cast<const T*>(grad);
    a.x = static_cast<const T*>(x);
    a.scale = {scale, scale_stream, scale_clip, scale_frame};
    a.grad_x = static_cast<T*>(grad_x);
    a.partials = partials;
    a.sizes = sizes;
    a.parts = (patches + rows_per_part - 1) / rows_per_part;
    a.rows_per_part = rows_per_part;
    a.eps = static_cast<float>(eps);
    return launch_grad(stream, a);
  });
}

}  // namespace u4d
