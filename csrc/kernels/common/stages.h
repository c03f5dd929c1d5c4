// Stages of shared memory between the thread that fills them and the warpgroups that compute.
#pragma once

#include "kernels/common/hopper.h"
#include "kernels/common/launch.h"

namespace u4d {

// A place in the ring of stages; the parity is that of the barriers' phase.
template <int kStages>
struct Ring {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// One arrival for each warp.
__device__ __forceinline__ void release(uint64_t* empty) {
  if (threadIdx.x % kWarp == 0) hopper::barrier_arrive(empty);
}

// Dynamic shared memory from its first multiple of kAlignment bytes on. The offset and not the pointer is rounded up:
// the compiler goes on knowing that this is shared memory.
template <int kAlignment>
__device__ __forceinline__ unsigned char* aligned_shared(unsigned char* dynamic) {
  return dynamic + (kAlignment - hopper::shared_address(dynamic) % kAlignment) % kAlignment;
}

}  // namespace u4d
