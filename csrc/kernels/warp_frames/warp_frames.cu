#include "kernels/common/launch.h"

#include "kernels/warp_frames/warp_frames.h"

#include "kernels/warp_frames/pair_geometry.h"
#include "kernels/warp_frames/relate_pairs.cuh"

namespace u4d {
namespace {

constexpr int kThreads = 256;

struct Frames {
  const float* rgb;    // of i; may be null where colours are not read
  const float* depth;  // of all frames
  const int64_t* pairs;
  const PairGeometry* geometry;
};

// What one pixel of one pair sees.
struct Sight {
  Landing at;
  Taps taps;
  int64_t i;  // frame, counted over the batch
  float u, depth;
  bool visible;
};

__device__ __forceinline__ Sight look(const Frames& in, const WarpSizes& sizes, OcclusionTest test, int64_t b,
                                      int64_t m, int32_t pixel, const RowGeometry& row) {
  const int64_t plane = sizes.pixels;
  Sight sight;
  sight.i = b * sizes.frames + in.pairs[2 * m];
  sight.u = float(pixel % sizes.width) + 0.5f;
  sight.depth = in.depth[(b * sizes.frames + in.pairs[2 * m + 1]) * plane + pixel];
  sight.at = land(row, sight.u, sight.depth, float(sizes.width - 1), float(sizes.height - 1));
  sight.taps = taps_at(sight.at.x, sight.at.y, sizes.width, sizes.height);
  const float depth_i = in.depth[sight.i * plane + nearest_texel(sight.at.x, sight.at.y, sizes.width)];
  sight.visible = sight.at.inside && (test.off || unoccluded(sight.at.z, depth_i, test.one_plus_occlusion));
  return sight;
}

// The four taps of one colour.
struct Texels {
  float upper_left, upper_right, lower_left, lower_right;
};

__device__ __forceinline__ int64_t first_tap(const Taps& taps, const WarpSizes& sizes) {
  return int64_t(taps.y0) * sizes.width + taps.x0;
}

__device__ __forceinline__ Texels texels_of(const float* plane, const Taps& taps, const WarpSizes& sizes) {
  const float* tap = plane + first_tap(taps, sizes);
  const int32_t right = sizes.width > 1 ? 1 : 0;
  const int32_t down = sizes.height > 1 ? sizes.width : 0;
  return {tap[0], tap[right], tap[down], tap[down + right]};
}

// One thread per pixel of a pair.
__global__ __launch_bounds__(kThreads) void warp_kernel(Frames in, WarpSizes sizes, OcclusionTest test, float* warped,
                                                        uint8_t* valid) {
  const int64_t plane = sizes.pixels;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= sizes.batch * sizes.pairs * plane) return;
  const int64_t at = index / plane;
  const int32_t pixel = int32_t(index % plane);
  const int64_t m = at % sizes.pairs;
  float* out = warped + 3 * plane * at + pixel;
  bool visible = false;
  if (frames_exist(in.pairs + 2 * m, sizes.frames)) {
    const RowGeometry row = row_geometry(in.geometry[at], pixel / sizes.width);
    const Sight sight = look(in, sizes, test, at / sizes.pairs, m, pixel, row);
    visible = sight.visible;
    if (visible) {
      for (int c = 0; c < 3; ++c) {
        const Texels t = texels_of(in.rgb + (3 * sight.i + c) * plane, sight.taps, sizes);
        out[c * plane] =
            bilinear(t.upper_left, t.upper_right, t.lower_left, t.lower_right, sight.taps.fx, sight.taps.fy);
      }
    }
  }
  if (!visible) {
    for (int c = 0; c < 3; ++c) out[c * plane] = 0.0f;
  }
  valid[index] = visible;
}

// One thread per pixel of a frame; it adds the pairs that look from it, in order.
__global__ __launch_bounds__(kThreads) void depth_grad_kernel(const float* grad_warped, Frames in, WarpSizes sizes,
                                                              OcclusionTest test, float* grad_depth) {
  const int64_t plane = sizes.pixels;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= sizes.batch * sizes.frames * plane) return;
  const int64_t j = index / plane;
  const int64_t b = j / sizes.frames;
  const int32_t pixel = int32_t(index % plane);
  float total = 0.0f;
  for (int64_t m = 0; m < sizes.pairs; ++m) {
    if (!frames_exist(in.pairs + 2 * m, sizes.frames) || b * sizes.frames + in.pairs[2 * m + 1] != j) continue;
    const int64_t at = b * sizes.pairs + m;
    const RowGeometry row = row_geometry(in.geometry[at], pixel / sizes.width);
    const Sight sight = look(in, sizes, test, b, m, pixel, row);
    if (!sight.visible) continue;
    float slope_x = 0.0f;
    float slope_y = 0.0f;
    for (int c = 0; c < 3; ++c) {
      const Texels t = texels_of(in.rgb + (3 * sight.i + c) * plane, sight.taps, sizes);
      const float grad = grad_warped[(3 * at + c) * plane + pixel];
      const float across_upper = t.upper_right - t.upper_left;
      const float across_lower = t.lower_right - t.lower_left;
      slope_x += grad * (across_upper + sight.taps.fy * (across_lower - across_upper));
      slope_y += grad * (t.lower_left - t.upper_left + sight.taps.fx * (across_lower - across_upper));
    }
    if (sight.at.free_x) total += slope_x * velocity_x(row, sight.u, sight.at.z);
    if (sight.at.free_y) total += slope_y * velocity_y(row, sight.u, sight.at.z);
  }
  grad_depth[index] = total;
}

// Integers per unit of the largest gradient, as a power of two: so many that rounding is far below float32's, so few
// that no sum of `terms` weights overflows 63 bits.
inline double integer_scale(int64_t terms) {
  int bits = 62;
  for (; terms > 0; terms /= 2) --bits;
  return double(int64_t(1) << (bits < 40 ? (bits > 0 ? bits : 0) : 40));
}

__global__ __launch_bounds__(kThreads) void clear_kernel(unsigned long long* sums, int64_t count) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < count) sums[index] = 0;
}

// One thread per pixel of a pair; sums of integers do not depend on the order in which threads come.
__global__ __launch_bounds__(kThreads) void scatter_kernel(const float* grad_warped, Frames in, WarpSizes sizes,
                                                           OcclusionTest test, double scale, const float* largest,
                                                           unsigned long long* sums) {
  const int64_t plane = sizes.pixels;
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= sizes.batch * sizes.pairs * plane) return;
  const int64_t at = index / plane;
  const int32_t pixel = int32_t(index % plane);
  const int64_t m = at % sizes.pairs;
  if (!frames_exist(in.pairs + 2 * m, sizes.frames)) return;
  if (!(*largest > 0.0f && *largest <= FLT_MAX)) return;
  const RowGeometry row = row_geometry(in.geometry[at], pixel / sizes.width);
  const Sight sight = look(in, sizes, test, at / sizes.pairs, m, pixel, row);
  if (!sight.visible) return;
  const int32_t right = sizes.width > 1 ? 1 : 0;
  const int32_t down = sizes.height > 1 ? sizes.width : 0;
  const double fx = sight.taps.fx;
  const double fy = sight.taps.fy;
  for (int c = 0; c < 3; ++c) {
    unsigned long long* tap = sums + (3 * sight.i + c) * plane + first_tap(sight.taps, sizes);
    const double grad = grad_warped[(3 * at + c) * plane + pixel] / double(*largest) * scale;
    atomicAdd(tap, static_cast<unsigned long long>(static_cast<long long>(rint(grad * (1.0 - fy) * (1.0 - fx)))));
    atomicAdd(tap + right, static_cast<unsigned long long>(static_cast<long long>(rint(grad * (1.0 - fy) * fx))));
    atomicAdd(tap + down, static_cast<unsigned long long>(static_cast<long long>(rint(grad * fy * (1.0 - fx)))));
    atomicAdd(tap + down + right, static_cast<unsigned long long>(static_cast<long long>(rint(grad * fy * fx))));
  }
}

__global__ __launch_bounds__(kThreads) void unscale_kernel(const unsigned long long* sums, int64_t count, double scale,
                                                           const float* largest, float* grad_rgb) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const double unit = double(*largest) / scale;
  // A gradient that is not finite is told by NaN everywhere, never hidden: inf * 0 and NaN * 0 are NaN.
  const bool finite = *largest <= FLT_MAX;
  grad_rgb[index] = finite ? float(double(static_cast<long long>(sums[index])) * unit) : float(unit) * 0.0f;
}

bool fits_a_grid(int64_t work) { return work / kThreads < INT32_MAX; }

}  // namespace

Status warp_frames_cuda(void* stream, const float* rgb, const float* depth, const float* intrinsics,
                        const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames, int64_t height,
                        int64_t width, int64_t num_pairs, double occlusion, float* geometry, float* warped,
                        uint8_t* valid) {
  WarpSizes sizes;
  Status status = check_sizes(batch, frames, height, width, num_pairs, &sizes);
  if (status != kOk) return status;
  const int64_t work = batch * num_pairs * sizes.pixels;
  if (work == 0) return kOk;
  if (!fits_a_grid(work)) return kTooLarge;
  PairGeometry* related = reinterpret_cast<PairGeometry*>(geometry);
  status = relate_pairs(stream, intrinsics, cam_to_world, pairs, sizes, related);
  if (status != kOk) return status;
  const Frames in{rgb, depth, pairs, related};
  U4D_LAUNCH(warp_kernel, blocks_for(work, kThreads), kThreads, 0, stream, in, sizes, occlusion_test(occlusion), warped,
             valid);
  return launch_status();
}

Status warp_frames_depth_grad_cuda(void* stream, const float* grad_warped, const float* rgb, const float* depth,
                                   const float* intrinsics, const float* cam_to_world, const int64_t* pairs,
                                   int64_t batch, int64_t frames, int64_t height, int64_t width, int64_t num_pairs,
                                   double occlusion, float* geometry, float* grad_depth) {
  WarpSizes sizes;
  Status status = check_sizes(batch, frames, height, width, num_pairs, &sizes);
  if (status != kOk) return status;
  const int64_t work = batch * frames * sizes.pixels;
  if (work == 0) return kOk;
  if (!fits_a_grid(work)) return kTooLarge;
  PairGeometry* related = reinterpret_cast<PairGeometry*>(geometry);
  if (num_pairs > 0) status = relate_pairs(stream, intrinsics, cam_to_world, pairs, sizes, related);
  if (status != kOk) return status;
  const Frames in{rgb, depth, pairs, related};
  U4D_LAUNCH(depth_grad_kernel, blocks_for(work, kThreads), kThreads, 0, stream, grad_warped, in, sizes,
             occlusion_test(occlusion), grad_depth);
  return launch_status();
}

Status warp_frames_rgb_grad_cuda(void* stream, const float* grad_warped, const float* depth, const float* intrinsics,
                                 const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames,
                                 int64_t height, int64_t width, int64_t num_pairs, double occlusion, float* geometry,
                                 const float* largest, int64_t* sums, float* grad_rgb) {
  WarpSizes sizes;
  Status status = check_sizes(batch, frames, height, width, num_pairs, &sizes);
  if (status != kOk) return status;
  const int64_t count = batch * frames * 3 * sizes.pixels;
  const int64_t work = batch * num_pairs * sizes.pixels;
  if (count == 0) return kOk;
  if (!fits_a_grid(work) || !fits_a_grid(count)) return kTooLarge;
  unsigned long long* integers = reinterpret_cast<unsigned long long*>(sums);
  U4D_LAUNCH(clear_kernel, blocks_for(count, kThreads), kThreads, 0, stream, integers, count);
  status = launch_status();
  const double scale = integer_scale(4 * num_pairs * sizes.pixels);
  if (status == kOk && work > 0) {
    PairGeometry* related = reinterpret_cast<PairGeometry*>(geometry);
    status = relate_pairs(stream, intrinsics, cam_to_world, pairs, sizes, related);
    if (status != kOk) return status;
    const Frames in{nullptr, depth, pairs, related};
    U4D_LAUNCH(scatter_kernel, blocks_for(work, kThreads), kThreads, 0, stream, grad_warped, in, sizes,
               occlusion_test(occlusion), scale, largest, integers);
    status = launch_status();
  }
  if (status != kOk) return status;
  U4D_LAUNCH(unscale_kernel, blocks_for(count, kThreads), kThreads, 0, stream, integers, count, scale, largest,
             grad_rgb);
  return launch_status();
}

}  // namespace u4d
