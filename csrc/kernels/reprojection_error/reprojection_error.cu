#include "kernels/common/launch.h"

#include "kernels/reprojection_error/reprojection_error.h"

#include "kernels/warp_frames/pair_geometry.h"
#include "kernels/warp_frames/relate_pairs.cuh"

namespace u4d {
namespace {

constexpr int kThreads = 256;

struct BlockSums {
  double difference;  // over visible pixels and three colours
  double visible;     // number of visible pixels
};

// The sum over a block of threads, in a fixed order; whole in thread 0.
__device__ __forceinline__ BlockSums sum_of_block(BlockSums mine) {
  __shared__ BlockSums all[kThreads];
  all[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      all[threadIdx.x].difference += all[threadIdx.x + half].difference;
      all[threadIdx.x].visible += all[threadIdx.x + half].visible;
    }
    __syncthreads();
  }
  return all[0];
}

__device__ __forceinline__ float difference_at(const float* rgb_i, const float* rgb_j, int32_t pixel, const Taps& taps,
                                               const WarpSizes& sizes) {
  const int64_t plane = sizes.pixels;
  const int32_t right = sizes.width > 1 ? 1 : 0;
  const int32_t down = sizes.height > 1 ? sizes.width : 0;
  const float* tap = rgb_i + int64_t(taps.y0) * sizes.width + taps.x0;
  float sum = 0.0f;
  for (int c = 0; c < 3; ++c, tap += plane) {
    const float colour = bilinear(tap[0], tap[right], tap[down], tap[down + right], taps.fx, taps.fy);
    sum += fabsf(colour - rgb_j[c * plane + pixel]);
  }
  return sum;
}

// One block of threads per (clip, pair, block of rows).
__global__ __launch_bounds__(kThreads) void compare_kernel(const float* rgb, const float* depth, const int64_t* pairs,
                                                           const PairGeometry* geometry, WarpSizes sizes,
                                                           OcclusionTest test, int64_t rows_per_block, int64_t blocks,
                                                           BlockSums* sums) {
  const int64_t plane = sizes.pixels;
  const int64_t at = blockIdx.x / blocks;
  const int64_t first_row = blockIdx.x % blocks * rows_per_block;
  const int64_t rows = min(rows_per_block, sizes.height - first_row);
  const int64_t* pair = pairs + 2 * (at % sizes.pairs);
  double difference = 0.0;
  int32_t visible = 0;
  if (frames_exist(pair, sizes.frames)) {
    const int64_t i = at / sizes.pairs * sizes.frames + pair[0];
    const int64_t j = at / sizes.pairs * sizes.frames + pair[1];
    const PairGeometry related = geometry[at];
    const int32_t first = int32_t(first_row * sizes.width);
    const int32_t count = int32_t(rows * sizes.width);
    for (int32_t k = threadIdx.x; k < count; k += kThreads) {
      const int32_t pixel = first + k;
      const int32_t row = pixel / sizes.width;
      const float u = float(pixel - row * sizes.width) + 0.5f;
      const Landing landing = land(row_geometry(related, row), u, depth[j * plane + pixel], float(sizes.width - 1),
                                   float(sizes.height - 1));
      if (!landing.inside) continue;
      const float depth_i = depth[i * plane + nearest_texel(landing.x, landing.y, sizes.width)];
      if (!test.off && !unoccluded(landing.z, depth_i, test.one_plus_occlusion)) continue;
      const Taps taps = taps_at(landing.x, landing.y, sizes.width, sizes.height);
      difference += difference_at(rgb + 3 * plane * i, rgb + 3 * plane * j, pixel, taps, sizes);
      ++visible;
    }
  }
  const BlockSums total = sum_of_block({difference, double(visible)});
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// One block of threads per clip: a thread takes every 256th pair.
__global__ __launch_bounds__(kThreads) void finish_kernel(const BlockSums* sums, WarpSizes sizes, int64_t blocks,
                                                          float* error, float* pair_error, float* overlap) {
  const int64_t first = int64_t(blockIdx.x) * sizes.pairs;
  double mine = 0.0;
  for (int64_t m = threadIdx.x; m < sizes.pairs; m += kThreads) {
    BlockSums total{0.0, 0.0};
    for (int64_t k = 0; k < blocks; ++k) {
      total.difference += sums[(first + m) * blocks + k].difference;
      total.visible += sums[(first + m) * blocks + k].visible;
    }
    double mean = total.visible > 0.0 ? total.difference / (3.0 * total.visible) : 1.0;
    // +inf for what is not finite: a minimum over candidates never picks it.
    mean = mean <= double(FLT_MAX) ? mean : double(INFINITY);
    pair_error[first + m] = float(mean);
    overlap[first + m] = sizes.pixels > 0 ? float(total.visible / double(sizes.pixels)) : 0.0f;
    mine += float(mean);
  }
  const BlockSums total = sum_of_block({mine, 0.0});
  if (threadIdx.x == 0) error[blockIdx.x] = float(total.difference / double(sizes.pairs));
}

}  // namespace

Status reprojection_error_cuda(void* stream, const float* rgb, const float* depth, const float* intrinsics,
                               const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames,
                               int64_t height, int64_t width, int64_t num_pairs, double occlusion,
                               int64_t rows_per_block, float* geometry, double* block_sums, float* error,
                               float* pair_error, float* overlap) {
  WarpSizes sizes;
  Status status = check_sizes(batch, frames, height, width, num_pairs, &sizes);
  if (status != kOk) return status;
  if (rows_per_block < 1) return kInvalidArgument;
  if (batch == 0) return kOk;
  const int64_t blocks = (height + rows_per_block - 1) / rows_per_block;
  const int64_t work = batch * num_pairs * blocks;
  if (work > INT32_MAX || batch > INT32_MAX) return kTooLarge;
  PairGeometry* related = reinterpret_cast<PairGeometry*>(geometry);
  BlockSums* sums = reinterpret_cast<BlockSums*>(block_sums);
  if (work > 0) {
    status = relate_pairs(stream, intrinsics, cam_to_world, pairs, sizes, related);
    if (status != kOk) return status;
    U4D_LAUNCH(compare_kernel, static_cast<unsigned int>(work), kThreads, 0, stream, rgb, depth, pairs, related, sizes,
               occlusion_test(occlusion), rows_per_block, blocks, sums);
    status = launch_status();
    if (status != kOk) return status;
  }
  U4D_LAUNCH(finish_kernel, static_cast<unsigned int>(batch), kThreads, 0, stream, sums, sizes, blocks, error,
             pair_error, overlap);
  return launch_status();
}

}  // namespace u4d
