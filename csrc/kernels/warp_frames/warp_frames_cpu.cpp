#include "kernels/warp_frames/warp_frames.h"

#include "kernels/warp_frames/pair_chunk.h"

namespace u4d {
namespace {

// One row of one pair: warped points to the first of three planes, valid to one.
U4D_CLONES void warp_row(const PairGeometry& pair, const float* rgb_i, const float* depth_i, const float* depth_j,
                         const WarpSizes& sizes, int32_t row, OcclusionTest test, float* warped, uint8_t* valid) {
  const RowGeometry geometry = row_geometry(pair, row);
  const int64_t plane = sizes.pixels;
  const int64_t start = int64_t(row) * sizes.width;
  PairChunk chunk;
  for (int32_t first = 0; first < sizes.width; first += kChunk) {
    const int32_t count = std::min(kChunk, sizes.width - first);
    place_chunk(geometry, sizes, first, count, depth_j + start + first, chunk);
    fetch_colours(rgb_i, sizes, count, chunk);
    fetch_depth(depth_i, count, chunk);
    float* out = warped + start + first;
    uint8_t* out_valid = valid + start + first;
#pragma omp simd
    for (int32_t k = 0; k < count; ++k) {
      const bool visible = seen(chunk, k, test);
      out[k] = visible ? colour(chunk, 0, k) : 0.0f;
      out[plane + k] = visible ? colour(chunk, 1, k) : 0.0f;
      out[2 * plane + k] = visible ? colour(chunk, 2, k) : 0.0f;
      out_valid[k] = visible;
    }
  }
}

// One row of one pair: adds d(warped)/d(depth_j) * grad_warped to grad_depth.
U4D_CLONES void add_depth_grad_row(const PairGeometry& pair, const float* grad_warped, const float* rgb_i,
                                   const float* depth_i, const float* depth_j, const WarpSizes& sizes, int32_t row,
                                   OcclusionTest test, float* grad_depth) {
  const RowGeometry geometry = row_geometry(pair, row);
  const int64_t plane = sizes.pixels;
  const int64_t start = int64_t(row) * sizes.width;
  const float last_x = float(sizes.width - 1);
  const float last_y = float(sizes.height - 1);
  PairChunk chunk;
  for (int32_t first = 0; first < sizes.width; first += kChunk) {
    const int32_t count = std::min(kChunk, sizes.width - first);
    const float* depth = depth_j + start + first;
    const float* grad = grad_warped + start + first;
    float* out = grad_depth + start + first;
    place_chunk(geometry, sizes, first, count, depth, chunk);
    fetch_colours(rgb_i, sizes, count, chunk);
    fetch_depth(depth_i, count, chunk);
#pragma omp simd
    for (int32_t k = 0; k < count; ++k) {
      float slope_x = 0.0f;
      float slope_y = 0.0f;
      for (int c = 0; c < 3; ++c) {
        const float across_upper = chunk.upper[c][2 * k + 1] - chunk.upper[c][2 * k];
        const float across_lower = chunk.lower[c][2 * k + 1] - chunk.lower[c][2 * k];
        const float down_left = chunk.lower[c][2 * k] - chunk.upper[c][2 * k];
        slope_x += grad[c * plane + k] * (across_upper + chunk.fy[k] * (across_lower - across_upper));
        slope_y += grad[c * plane + k] * (down_left + chunk.fx[k] * (across_lower - across_upper));
      }
      const float u = float(first + k) + 0.5f;
      const Landing at = land(geometry, u, depth[k], last_x, last_y);
      const float total =
          at.free_x * slope_x * velocity_x(geometry, u, at.z) + at.free_y * slope_y * velocity_y(geometry, u, at.z);
      out[k] += seen(chunk, k, test) ? total : 0.0f;
    }
  }
}

// One row of one pair: adds the bilinear weights times grad_warped to the three planes of grad_rgb.
U4D_CLONES void add_rgb_grad_row(const PairGeometry& pair, const float* grad_warped, const float* depth_i,
                                 const float* depth_j, const WarpSizes& sizes, int32_t row, OcclusionTest test,
                                 float* grad_rgb) {
  const RowGeometry geometry = row_geometry(pair, row);
  const int64_t plane = sizes.pixels;
  const int64_t start = int64_t(row) * sizes.width;
  const int64_t right = sizes.width > 1;
  const int64_t down = sizes.height > 1 ? sizes.width : 0;
  PairChunk chunk;
  for (int32_t first = 0; first < sizes.width; first += kChunk) {
    const int32_t count = std::min(kChunk, sizes.width - first);
    place_chunk(geometry, sizes, first, count, depth_j + start + first, chunk);
    fetch_depth(depth_i, count, chunk);
    for (int32_t k = 0; k < count; ++k) {
      if (!seen(chunk, k, test)) continue;
      const float lower = chunk.fy[k];
      const float upper = 1.0f - lower;
      for (int c = 0; c < 3; ++c) {
        const float grad = grad_warped[c * plane + start + first + k];
        float* tap = grad_rgb + c * plane + chunk.first_tap[k];
        tap[0] += grad * upper * (1.0f - chunk.fx[k]);
        tap[right] += grad * upper * chunk.fx[k];
        tap[down] += grad * lower * (1.0f - chunk.fx[k]);
        tap[down + right] += grad * lower * chunk.fx[k];
      }
    }
  }
}

}  // namespace

Status warp_frames_cpu(int threads, const float* rgb, const float* depth, const float* intrinsics,
                       const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames, int64_t height,
                       int64_t width, int64_t num_pairs, double occlusion, float* geometry, float* warped,
                       uint8_t* valid) {
  WarpSizes sizes;
  const Status status = check_sizes(batch, frames, height, width, num_pairs, &sizes);
  if (status != kOk) return status;
  const int64_t plane = sizes.pixels;
  const OcclusionTest test = occlusion_test(occlusion);
  PairGeometry* related = reinterpret_cast<PairGeometry*>(geometry);
  relate_pairs(intrinsics, cam_to_world, pairs, sizes, related);

#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < batch * num_pairs * height; ++task) {
    const int64_t at = task / height;
    const int64_t row = task % height;
    const int64_t* pair = pairs + 2 * (at % num_pairs);
    float* out = warped + 3 * plane * at;
    uint8_t* out_valid = valid + plane * at;
    if (!frames_exist(pair, frames)) {
      for (int c = 0; c < 3; ++c) std::fill_n(out + c * plane + row * width, width, 0.0f);
      std::fill_n(out_valid + row * width, width, uint8_t(0));
      continue;
    }
    const int64_t i = at / num_pairs * frames + pair[0];
    const int64_t j = at / num_pairs * frames + pair[1];
    warp_row(related[at], rgb + 3 * plane * i, depth + plane * i, depth + plane * j, sizes, int32_t(row), test, out,
             out_valid);
  }
  return kOk;
}

// A task owns a row of grad_depth and adds the pairs that look from it, in order.
Status warp_frames_depth_grad_cpu(int threads, const float* grad_warped, const float* rgb, const float* depth,
                                  const float* intrinsics, const float* cam_to_world, const int64_t* pairs,
                                  int64_t batch, int64_t frames, int64_t height, int64_t width, int64_t num_pairs,
                                  double occlusion, float* geometry, float* grad_depth) {
  WarpSizes sizes;
  const Status status = check_sizes(batch, frames, height, width, num_pairs, &sizes);
  if (status != kOk) return status;
  const int64_t plane = sizes.pixels;
  const OcclusionTest test = occlusion_test(occlusion);
  PairGeometry* related = reinterpret_cast<PairGeometry*>(geometry);
  relate_pairs(intrinsics, cam_to_world, pairs, sizes, related);

#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < batch * frames * height; ++task) {
    const int64_t j = task / height;
    const int64_t row = task % height;
    const int64_t b = j / frames;
    std::fill_n(grad_depth + plane * j + row * width, width, 0.0f);
    for (int64_t m = 0; m < num_pairs; ++m) {
      if (!frames_exist(pairs + 2 * m, frames) || b * frames + pairs[2 * m + 1] != j) continue;
      const int64_t i = b * frames + pairs[2 * m];
      const int64_t at = b * num_pairs + m;
      add_depth_grad_row(related[at], grad_warped + 3 * plane * at, rgb + 3 * plane * i, depth + plane * i,
                         depth + plane * j, sizes, int32_t(row), test, grad_depth + plane * j);
    }
  }
  return kOk;
}

// A task owns one frame of grad_rgb and adds the pairs that look at it, in order.
Status warp_frames_rgb_grad_cpu(int threads, const float* grad_warped, const float* depth, const float* intrinsics,
                                const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames,
                                int64_t height, int64_t width, int64_t num_pairs, double occlusion, float* geometry,
                                const float*, int64_t*, float* grad_rgb) {
  WarpSizes sizes;
  const Status status = check_sizes(batch, frames, height, width, num_pairs, &sizes);
  if (status != kOk) return status;
  const int64_t plane = sizes.pixels;
  const OcclusionTest test = occlusion_test(occlusion);
  PairGeometry* related = reinterpret_cast<PairGeometry*>(geometry);
  relate_pairs(intrinsics, cam_to_world, pairs, sizes, related);

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < batch * frames; ++i) {
    const int64_t b = i / frames;
    float* out = grad_rgb + 3 * plane * i;
    std::fill_n(out, 3 * plane, 0.0f);
    for (int64_t m = 0; m < num_pairs; ++m) {
      if (!frames_exist(pairs + 2 * m, frames) || b * frames + pairs[2 * m] != i) continue;
      const int64_t j = b * frames + pairs[2 * m + 1];
      const int64_t at = b * num_pairs + m;
      for (int32_t row = 0; row < sizes.height; ++row) {
        add_rgb_grad_row(related[at], grad_warped + 3 * plane * at, depth + plane * i, depth + plane * j, sizes, row,
                         test, out);
      }
    }
  }
  return kOk;
}

}  // namespace u4d
