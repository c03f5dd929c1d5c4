#include "kernels/reprojection_error/reprojection_error.h"

#include <cmath>
#include <limits>

#include "kernels/warp_frames/pair_chunk.h"

namespace u4d {
namespace {

struct BlockSums {
  double difference;  // over visible pixels and three colours
  double visible;     // number of visible pixels
};

// One row of one pair.
U4D_CLONES void add_row(const PairGeometry& pair, const float* rgb_i, const float* depth_i, const float* rgb_j,
                        const float* depth_j, const WarpSizes& sizes, int32_t row, OcclusionTest test,
                        BlockSums* sums) {
  const RowGeometry geometry = row_geometry(pair, row);
  const int64_t plane = sizes.pixels;
  const int64_t start = int64_t(row) * sizes.width;
  PairChunk chunk;
  for (int32_t first = 0; first < sizes.width; first += kChunk) {
    const int32_t count = std::min(kChunk, sizes.width - first);
    const float* target = rgb_j + start + first;
    place_chunk(geometry, sizes, first, count, depth_j + start + first, chunk);
    fetch_colours(rgb_i, sizes, count, chunk);
    fetch_depth(depth_i, count, chunk);
    float difference = 0.0f;
    int32_t visible = 0;
#pragma omp simd reduction(+ : difference, visible)
    for (int32_t k = 0; k < count; ++k) {
      const float here = std::fabs(colour(chunk, 0, k) - target[k]) +
                         std::fabs(colour(chunk, 1, k) - target[plane + k]) +
                         std::fabs(colour(chunk, 2, k) - target[2 * plane + k]);
      const bool counts = seen(chunk, k, test);
      difference += counts ? here : 0.0f;
      visible += counts;
    }
    sums->difference += difference;
    sums->visible += visible;
  }
}

// The sums of all blocks of a pair, in order, as the two numbers that are reported.
void finish_pair(const BlockSums* blocks, int64_t count, int64_t pixels, float* pair_error, float* overlap) {
  BlockSums total{0.0, 0.0};
  for (int64_t k = 0; k < count; ++k) {
    total.difference += blocks[k].difference;
    total.visible += blocks[k].visible;
  }
  const double mean = total.visible > 0.0 ? total.difference / (3.0 * total.visible) : 1.0;
  *pair_error = std::isfinite(mean) ? float(mean) : std::numeric_limits<float>::infinity();
  *overlap = pixels > 0 ? float(total.visible / double(pixels)) : 0.0f;
}

}  // namespace

Status reprojection_error_cpu(int threads, const float* rgb, const float* depth, const float* intrinsics,
                              const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames,
                              int64_t height, int64_t width, int64_t num_pairs, double occlusion,
                              int64_t rows_per_block, float* geometry, double* block_sums, float* error,
                              float* pair_error, float* overlap) {
  WarpSizes sizes;
  const Status status = check_sizes(batch, frames, height, width, num_pairs, &sizes);
  if (status != kOk) return status;
  if (rows_per_block < 1) return kInvalidArgument;
  const int64_t plane = sizes.pixels;
  const int64_t blocks = (height + rows_per_block - 1) / rows_per_block;
  const OcclusionTest test = occlusion_test(occlusion);
  PairGeometry* related = reinterpret_cast<PairGeometry*>(geometry);
  BlockSums* sums = reinterpret_cast<BlockSums*>(block_sums);
  relate_pairs(intrinsics, cam_to_world, pairs, sizes, related);

#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t task = 0; task < batch * num_pairs * blocks; ++task) {
    const int64_t block = task % blocks;
    const int64_t at = task / blocks;
    const int64_t* pair = pairs + 2 * (at % num_pairs);
    BlockSums total{0.0, 0.0};
    if (frames_exist(pair, frames)) {
      const int64_t i = at / num_pairs * frames + pair[0];
      const int64_t j = at / num_pairs * frames + pair[1];
      const int64_t last = std::min(height, (block + 1) * rows_per_block);
      for (int64_t row = block * rows_per_block; row < last; ++row) {
        add_row(related[at], rgb + 3 * plane * i, depth + plane * i, rgb + 3 * plane * j, depth + plane * j, sizes,
                int32_t(row), test, &total);
      }
    }
    sums[task] = total;
  }

  for (int64_t b = 0; b < batch; ++b) {
    double total = 0.0;
    for (int64_t m = b * num_pairs; m < (b + 1) * num_pairs; ++m) {
      finish_pair(sums + m * blocks, blocks, plane, pair_error + m, overlap + m);
      total += pair_error[m];
    }
    error[b] = float(total / double(num_pairs));
  }
  return kOk;
}

}  // namespace u4d
