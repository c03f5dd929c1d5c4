// Warpgroups of a block.
#pragma once

#include "kernels/common/hopper.h"

namespace u4d {

// Number of this thread's warpgroup. It is the same in a whole warp, which the compiler cannot know of threadIdx: by
// the shuffle it does, and keeps what depends on it, such as matrix descriptors, in uniform registers. Without, two to
// four moves come before each product.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / hopper::kWarpgroup, 0);
}

}  // namespace u4d
