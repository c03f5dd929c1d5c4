// Where a pixel of frame j lands in frame i: the one piece of geometry that warp_frames and reprojection_error share,
// written once for CPU and GPU.
//
// A pixel (u, v) of j with depth D is the point D K_j^-1 [u v 1] of camera j, so camera i sees it at
//   p = D A [u v 1] + b,   A = K_i R_i^-1 R_j K_j^-1,   b = K_i R_i^-1 (o_j - o_i),
// position (p.x / p.z, p.y / p.z) and depth p.z. Pixel centres are at .5; positions below are in texels, that is
// with the first pixel's centre at 0.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/common/host_device.h"
#include "kernels/common/status.h"

namespace u4d {

// How far outside the outermost pixel centres a position may lie, to be pulled back onto them: float32 places a pixel
// that lands exactly on the border up to about 1e-3 pixels off, and an image must map onto itself completely.
constexpr float kBorderTolerance = 1e-2f;

struct PairGeometry {
  float a[9];  // A, row by row
  float b[3];
};

// Inverse of a 3x3 matrix; false, and no inverse, if it is singular or a number in it is not finite.
U4D_HD bool invert3(const double* m, double* out) {
  const double c0 = m[4] * m[8] - m[5] * m[7];
  const double c1 = m[5] * m[6] - m[3] * m[8];
  const double c2 = m[3] * m[7] - m[4] * m[6];
  const double determinant = m[0] * c0 + m[1] * c1 + m[2] * c2;
  if (!(determinant < 0.0 || determinant > 0.0)) return false;
  const double scale = 1.0 / determinant;
  out[0] = c0 * scale;
  out[1] = (m[2] * m[7] - m[1] * m[8]) * scale;
  out[2] = (m[1] * m[5] - m[2] * m[4]) * scale;
  out[3] = c1 * scale;
  out[4] = (m[0] * m[8] - m[2] * m[6]) * scale;
  out[5] = (m[2] * m[3] - m[0] * m[5]) * scale;
  out[6] = c2 * scale;
  out[7] = (m[1] * m[6] - m[0] * m[7]) * scale;
  out[8] = (m[0] * m[4] - m[1] * m[3]) * scale;
  return scale != 0.0;
}

U4D_HD void multiply3(const double* left, const double* right, double* out) {
  for (int row = 0; row < 3; ++row) {
    for (int column = 0; column < 3; ++column) {
      double sum = 0.0;
      for (int k = 0; k < 3; ++k) sum += left[3 * row + k] * right[3 * k + column];
      out[3 * row + column] = sum;
    }
  }
}

// A pair whose frames do not exist, or with a camera that is no camera: every pixel lands nowhere.
U4D_HD PairGeometry no_geometry() {
  PairGeometry pair;
  for (int k = 0; k < 9; ++k) pair.a[k] = 0.0f;
  for (int k = 0; k < 3; ++k) pair.b[k] = 0.0f;
  return pair;
}

// In double: a few numbers per pair, and camera centres far from the origin would cost pixels otherwise.
U4D_HD PairGeometry relate_cameras(const float* intrinsics_i, const float* intrinsics_j, const float* cam_to_world_i,
                                   const float* cam_to_world_j) {
  double k_i[9], k_j[9], r_i[9], r_j[9], product[9], left[9], inverse[9], shift[3];
  for (int k = 0; k < 9; ++k) {
    k_i[k] = intrinsics_i[k];
    k_j[k] = intrinsics_j[k];
    r_i[k] = cam_to_world_i[4 * (k / 3) + k % 3];
    r_j[k] = cam_to_world_j[4 * (k / 3) + k % 3];
  }
  for (int k = 0; k < 3; ++k) shift[k] = double(cam_to_world_j[4 * k + 3]) - double(cam_to_world_i[4 * k + 3]);
  // K_i and R_j need no inverse, but what has none is no camera.
  if (!invert3(k_i, inverse) || !invert3(r_j, inverse) || !invert3(r_i, inverse)) return no_geometry();
  multiply3(k_i, inverse, left);
  PairGeometry pair;
  for (int k = 0; k < 3; ++k) {
    pair.b[k] = float(left[3 * k] * shift[0] + left[3 * k + 1] * shift[1] + left[3 * k + 2] * shift[2]);
  }
  if (!invert3(k_j, inverse)) return no_geometry();
  multiply3(left, r_j, product);
  multiply3(product, inverse, left);
  for (int k = 0; k < 9; ++k) pair.a[k] = float(left[k]);
  return pair;
}

// One pixel of j seen by camera i. Flags are int32 and not bool, which keeps GCC 12 from vectorising the loop over
// pixels.
struct Landing {
  float x, y;              // texels, pulled into [0, width - 1] x [0, height - 1]; 0 where not inside
  float z;                 // depth in camera i
  int32_t inside;          // depth of j valid, in front of camera i, inside image i
  int32_t free_x, free_y;  // the position was not pulled back in that direction, so it moves with the depth
};

// A and b applied to the pixels of one row of j: p(u) = depth * (a * u + offset) + b.
struct RowGeometry {
  float ax, ay, az, ox, oy, oz, bx, by, bz;
};

U4D_HD RowGeometry row_geometry(const PairGeometry& pair, int64_t row) {
  const float v = float(row) + 0.5f;
  return {
      pair.a[0], pair.a[3], pair.a[6], pair.a[1] * v + pair.a[2], pair.a[4] * v + pair.a[5], pair.a[7] * v + pair.a[8],
      pair.b[0], pair.b[1], pair.b[2]};
}

U4D_HD Landing land(const RowGeometry& row, float u, float depth, float last_x, float last_y) {
  Landing at;
  at.z = depth * (row.az * u + row.oz) + row.bz;
  const float x = (depth * (row.ax * u + row.ox) + row.bx) / at.z - 0.5f;
  const float y = (depth * (row.ay * u + row.oy) + row.by) / at.z - 0.5f;
  // NaN fails every comparison. `&` and not `&&`: no branches, so that the loop over pixels vectorises.
  at.inside = (depth > 0.0f) & (depth <= FLT_MAX) & (at.z > 0.0f) & (at.z <= FLT_MAX) & (x >= -kBorderTolerance) &
              (x <= last_x + kBorderTolerance) & (y >= -kBorderTolerance) & (y <= last_y + kBorderTolerance);
  at.free_x = (x >= 0.0f) & (x <= last_x);
  at.free_y = (y >= 0.0f) & (y <= last_y);
  at.x = at.inside ? x : 0.0f;
  at.y = at.inside ? y : 0.0f;
  at.x = at.x < 0.0f ? 0.0f : at.x;
  at.y = at.y < 0.0f ? 0.0f : at.y;
  at.x = at.x > last_x ? last_x : at.x;
  at.y = at.y > last_y ? last_y : at.y;
  return at;
}

// d(position)/d(depth): (a z - x c) / z with x = (depth a + b_x) / z, rearranged so that nothing large cancels.
U4D_HD float velocity_x(const RowGeometry& row, float u, float z) {
  return ((row.ax * u + row.ox) * row.bz - (row.az * u + row.oz) * row.bx) / (z * z);
}

U4D_HD float velocity_y(const RowGeometry& row, float u, float z) {
  return ((row.ay * u + row.oy) * row.bz - (row.az * u + row.oz) * row.by) / (z * z);
}

// The upper left of the four bilinear taps and the weights towards the others. The last column and row are never the
// first tap (unless they are the only one), so that the neighbour at +1 exists.
struct Taps {
  int32_t x0, y0;
  float fx, fy;
};

U4D_HD Taps taps_at(float x, float y, int32_t width, int32_t height) {
  Taps taps;
  const int32_t last_x0 = width > 1 ? width - 2 : 0;
  const int32_t last_y0 = height > 1 ? height - 2 : 0;
  taps.x0 = int32_t(x);
  taps.y0 = int32_t(y);
  taps.x0 = taps.x0 > last_x0 ? last_x0 : taps.x0;
  taps.y0 = taps.y0 > last_y0 ? last_y0 : taps.y0;
  taps.fx = x - float(taps.x0);
  taps.fy = y - float(taps.y0);
  return taps;
}

// The occlusion test's depth is that of the nearest pixel: an average across a depth edge is the depth of no surface,
// would hide the background beside the edge and show what is behind it.
U4D_HD int32_t nearest_texel(float x, float y, int32_t width) { return int32_t(y + 0.5f) * width + int32_t(x + 0.5f); }

// Not behind the surface of i by more than the tolerance; a pixel of i without depth can't be tested and shows nothing.
U4D_HD bool unoccluded(float z, float depth_i, float one_plus_occlusion) {
  return (depth_i <= FLT_MAX) & (z <= depth_i * one_plus_occlusion);
}

U4D_HD float bilinear(float upper_left, float upper_right, float lower_left, float lower_right, float fx, float fy) {
  const float upper = upper_left + fx * (upper_right - upper_left);
  const float lower = lower_left + fx * (lower_right - lower_left);
  return upper + fy * (lower - upper);
}

// The pair's frames both exist. Kernels never read outside their arrays, whatever `pairs` holds.
U4D_HD bool frames_exist(const int64_t* pair, int64_t frames) {
  return pair[0] >= 0 && pair[0] < frames && pair[1] >= 0 && pair[1] < frames;
}

U4D_HD PairGeometry pair_geometry(const float* intrinsics, const float* cam_to_world, const int64_t* pair,
                                  int64_t frames, int64_t b) {
  if (!frames_exist(pair, frames)) return no_geometry();
  const int64_t i = b * frames + pair[0];
  const int64_t j = b * frames + pair[1];
  return relate_cameras(intrinsics + 9 * i, intrinsics + 9 * j, cam_to_world + 16 * i, cam_to_world + 16 * j);
}

// Sizes that all kernels here take; the launchers reject others before they touch memory.
struct WarpSizes {
  int64_t batch, frames, pairs;
  int32_t height, width;
  int64_t pixels;  // of one image
};

// The occlusion argument (negative: no test) as numbers that a loop takes without a branch.
struct OcclusionTest {
  float one_plus_occlusion;
  int32_t off;
};

inline Status check_sizes(int64_t batch, int64_t frames, int64_t height, int64_t width, int64_t pairs, WarpSizes* out) {
  if (batch < 0 || frames < 0 || height < 0 || width < 0 || pairs < 0) return kInvalidArgument;
  if (height > 0 && width > INT32_MAX / height) return kTooLarge;
  *out = {batch, frames, pairs, int32_t(height), int32_t(width), height * width};
  return kOk;
}

inline OcclusionTest occlusion_test(double occlusion) {
  return {occlusion >= 0.0 ? float(1.0 + occlusion) : 1.0f, int32_t(!(occlusion >= 0.0))};
}

}  // namespace u4d
