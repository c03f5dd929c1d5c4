// Launching a kernel from a .cu file, the same for nvcc and for the host shim that tests compile it with.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

#ifdef U4D_HOST_SHIM
#include "kernels/common/host_shim.h"
#else
#include <cuda_runtime.h>

#define U4D_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace u4d {

// The error of the launch just made, or an earlier asynchronous one. Does not wait for the kernel.
inline Status launch_status() { return static_cast<Status>(cudaGetLastError()); }

}  // namespace u4d
#endif

namespace u4d {

constexpr int kWarp = 32;

// A grid size that covers `work` items; 0 items must not be launched (CUDA refuses an empty grid).
inline unsigned int blocks_for(std::int64_t work, int per_block) {
  return static_cast<unsigned int>((work + per_block - 1) / per_block);
}

}  // namespace u4d
