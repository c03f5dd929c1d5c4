// CPU only: a run of pixels of one row of frame j, placed in frame i and sampled there.
//
// Three passes over small arrays that stay in L1: arithmetic (vectorised), loads (scalar; two neighbouring taps are
// one 8-byte load, which is twice as quick as gather instructions), arithmetic (vectorised). Nothing is stored per
// pair.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/common/vectorise.h"
#include "kernels/warp_frames/pair_geometry.h"

namespace u4d {

constexpr int32_t kChunk = 128;

struct PairChunk {
  float fx[kChunk], fy[kChunk], z[kChunk], depth_i[kChunk];
  int32_t first_tap[kChunk], nearest[kChunk], inside[kChunk];
  float upper[3][2 * kChunk], lower[3][2 * kChunk];  // colour taps (x0, x0 + 1) of rows y0 and y0 + 1
};

// Where pixels [first, first + count) of a row land in frame i.
U4D_INLINE void place_chunk(const RowGeometry& row, const WarpSizes& sizes, int32_t first, int32_t count,
                            const float* depth_j, PairChunk& chunk) {
  const float last_x = float(sizes.width - 1);
  const float last_y = float(sizes.height - 1);
  const int32_t width = sizes.width;
  const int32_t height = sizes.height;
#pragma omp simd
  for (int32_t k = 0; k < count; ++k) {
    const Landing at = land(row, float(first + k) + 0.5f, depth_j[k], last_x, last_y);
    const Taps taps = taps_at(at.x, at.y, width, height);
    chunk.fx[k] = taps.fx;
    chunk.fy[k] = taps.fy;
    chunk.first_tap[k] = taps.y0 * width + taps.x0;
    chunk.nearest[k] = nearest_texel(at.x, at.y, width);
    chunk.z[k] = at.z;
    chunk.inside[k] = at.inside;
  }
}

// The colour taps of frame i.
U4D_INLINE void fetch_colours(const float* rgb_i, const WarpSizes& sizes, int32_t count, PairChunk& chunk) {
  const int64_t plane = sizes.pixels;
  const int64_t down = sizes.height > 1 ? sizes.width : 0;
  if (sizes.width > 1) {
    for (int32_t k = 0; k < count; ++k) {
      const float* tap = rgb_i + chunk.first_tap[k];
      for (int c = 0; c < 3; ++c) {
        std::memcpy(chunk.upper[c] + 2 * k, tap + c * plane, 2 * sizeof(float));
        std::memcpy(chunk.lower[c] + 2 * k, tap + c * plane + down, 2 * sizeof(float));
      }
    }
    return;
  }
  for (int32_t k = 0; k < count; ++k) {
    for (int c = 0; c < 3; ++c) {
      const float* tap = rgb_i + chunk.first_tap[k] + c * plane;
      chunk.upper[c][2 * k] = chunk.upper[c][2 * k + 1] = tap[0];
      chunk.lower[c][2 * k] = chunk.lower[c][2 * k + 1] = tap[down];
    }
  }
}

U4D_INLINE void fetch_depth(const float* depth_i, int32_t count, PairChunk& chunk) {
  for (int32_t k = 0; k < count; ++k) chunk.depth_i[k] = depth_i[chunk.nearest[k]];
}

U4D_INLINE bool seen(const PairChunk& chunk, int32_t k, OcclusionTest test) {
  return (chunk.inside[k] != 0) & ((test.off != 0) | unoccluded(chunk.z[k], chunk.depth_i[k], test.one_plus_occlusion));
}

U4D_INLINE float colour(const PairChunk& chunk, int32_t c, int32_t k) {
  return bilinear(chunk.upper[c][2 * k], chunk.upper[c][2 * k + 1], chunk.lower[c][2 * k], chunk.lower[c][2 * k + 1],
                  chunk.fx[k], chunk.fy[k]);
}

// geometry [batch, pairs]: every pair's cameras, once.
inline void relate_pairs(const float* intrinsics, const float* cam_to_world, const int64_t* pairs,
                         const WarpSizes& sizes, PairGeometry* geometry) {
  for (int64_t b = 0; b < sizes.batch; ++b) {
    for (int64_t m = 0; m < sizes.pairs; ++m) {
      geometry[b * sizes.pairs + m] = pair_geometry(intrinsics, cam_to_world, pairs + 2 * m, sizes.frames, b);
    }
  }
}

}  // namespace u4d
