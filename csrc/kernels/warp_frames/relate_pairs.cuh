// GPU only: every pair's cameras, once, by one thread each.
#pragma once

#include "kernels/common/launch.h"
#include "kernels/warp_frames/pair_geometry.h"

namespace u4d {
namespace {

__global__ void relate_pairs_kernel(const float* intrinsics, const float* cam_to_world, const int64_t* pairs,
                                    WarpSizes sizes, PairGeometry* geometry) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= sizes.batch * sizes.pairs) return;
  geometry[at] =
      pair_geometry(intrinsics, cam_to_world, pairs + 2 * (at % sizes.pairs), sizes.frames, at / sizes.pairs);
}

inline Status relate_pairs(void* stream, const float* intrinsics, const float* cam_to_world, const int64_t* pairs,
                           const WarpSizes& sizes, PairGeometry* geometry) {
  constexpr int kThreads = 128;
  const int64_t work = sizes.batch * sizes.pairs;
  U4D_LAUNCH(relate_pairs_kernel, blocks_for(work, kThreads), kThreads, 0, stream, intrinsics, cam_to_world, pairs,
             sizes, geometry);
  return launch_status();
}

}  // namespace
}  // namespace u4d
