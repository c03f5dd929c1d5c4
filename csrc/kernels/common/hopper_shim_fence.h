// What the copy engine and the tensor cores of hopper_shim.h see of shared memory: ordinary stores come there by
// fence_async_shared() only.
//
// After the PTX ISA ("fence.proxy", "Async proxy"). A fence is for its thread's own stores. To keep that apart costs
// time, so it is done on demand only (u4d_shim_strict_fences, or U4D_SHIM_STRICT_FENCES in the environment); else any
// thread's fence lets all stores through, and only a kernel that lacks the fence altogether shows.
#pragma once

#include "kernels/common/launch.h"

namespace u4d::hopper_shim {

alignas(1024) inline unsigned char async_shared[host_shim::kSharedLimit];
inline bool stores_fenced = false;

inline bool strict_fences = std::getenv("U4D_SHIM_STRICT_FENCES") != nullptr;
inline unsigned char noticed[host_shim::kSharedLimit];      // shared memory when it was last looked at
inline std::uint16_t unfenced_by[host_shim::kSharedLimit];  // a thread's number + 1; 0: nobody's fence is missing

inline void begin_fences() {
  stores_fenced = false;
  host_shim::poison(async_shared, host_shim::dynamic_bytes);
  std::memcpy(noticed, host_shim::dynamic_shared, host_shim::dynamic_bytes);
  std::fill(unfenced_by, unfenced_by + host_shim::dynamic_bytes, 0);
}

// Whatever has changed since the last look, this thread has written.
inline void notice_stores(int thread) {
  constexpr int kPiece = 256;
  if (!strict_fences) return;
  for (int first = 0; first < host_shim::dynamic_bytes; first += kPiece) {
    const int last = std::min(first + kPiece, host_shim::dynamic_bytes);
    if (!std::memcmp(noticed + first, host_shim::dynamic_shared + first, last - first)) continue;
    for (int i = first; i < last; ++i) {
      if (noticed[i] == host_shim::dynamic_shared[i]) continue;
      noticed[i] = host_shim::dynamic_shared[i];
      unfenced_by[i] = static_cast<std::uint16_t>(thread + 1);
    }
  }
}

inline void fence_stores(int thread) {
  stores_fenced = true;
  if (!strict_fences) return;
  notice_stores(thread);
  for (int i = 0; i < host_shim::dynamic_bytes; ++i) {
    if (unfenced_by[i] != thread + 1) continue;
    async_shared[i] = host_shim::dynamic_shared[i];
    unfenced_by[i] = 0;
  }
}

// The copy engine's own bytes need no fence.
inline void write_both_views(unsigned at, const unsigned char* bytes, std::size_t count) {
  for (unsigned char* view : {host_shim::dynamic_shared, async_shared, noticed}) std::memcpy(view + at, bytes, count);
  std::fill(unfenced_by + at, unfenced_by + at + count, 0);
}

inline const unsigned char* async_view() {
  if (stores_fenced && !strict_fences) {
    std::memcpy(async_shared, host_shim::dynamic_shared, host_shim::dynamic_bytes);
  }
  stores_fenced = false;
  return async_shared;
}

}  // namespace u4d::hopper_shim

// Whether a fence is for its thread's own stores only.
extern "C" __attribute__((visibility("default"), used, weak)) void u4d_shim_strict_fences(int value) {
  u4d::hopper_shim::strict_fences = value != 0;
}
