// Runs CUDA kernels without inline PTX on the CPU, so that a machine without GPU can test them. Tests only.
//
// Every thread of a block is a fiber. A fiber runs until it meets a barrier (__syncthreads, __syncwarp, a shuffle) or
// ends; then the next one runs. Blocks run one after the other. Running the threads of a block first to last and again
// last to first shows a missing barrier: with it the results agree, without it one of the two reads stale memory.
// What it cannot show: races between blocks, memory ordering, the cost of anything.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace u4d::host_shim {

enum class Waiting { kNo, kWarp, kBlock };

// A context starts a fiber on its stack; from then on _setjmp and _longjmp switch, which unlike swapcontext make no
// system call.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack;
  uint3 index;
  Waiting waiting = Waiting::kNo;
  bool done = false;
};

inline bool last_thread_first = false;
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline int current = 0;
inline std::function<void()> body;
inline unsigned char exchange[1024][16];  // one slot per thread of a block, for shuffles

inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;

inline void enter() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

inline void run_current() {
  Fiber& fiber = fibers[current];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void wait(Waiting what) {
  fibers[current].waiting = what;
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

inline void release(int first, int last) {
  for (int i = first; i < last; ++i) fibers[i].waiting = Waiting::kNo;
}

// All threads that are still there wait for the same thing: let them go. Returns whether any was let go.
inline bool release_if_complete(int first, int last, Waiting what) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    if (fibers[i].done) continue;
    if (fibers[i].waiting != what) return false;
    any = true;
  }
  if (any) release(first, last);
  return any;
}

inline void run_block() {
  constexpr std::size_t kStack = 256 * 1024;
  const int count = static_cast<int>(block_size.x * block_size.y * block_size.z);
  if (static_cast<int>(fibers.size()) < count) fibers.resize(count);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    const unsigned int n = static_cast<unsigned int>(i);
    fiber.index = {n % block_size.x, n / block_size.x % block_size.y, n / (block_size.x * block_size.y)};
    fiber.waiting = Waiting::kNo;
    fiber.done = false;
    fiber.started = false;
  }
  for (;;) {
    bool ran = false, all_done = true;
    for (int k = 0; k < count; ++k) {
      current = last_thread_first ? count - 1 - k : k;
      if (fibers[current].done) continue;
      all_done = false;
      if (fibers[current].waiting != Waiting::kNo) continue;
      thread_index = fibers[current].index;
      run_current();
      ran = true;
    }
    if (all_done) return;
    bool released = false;
    for (int warp = 0; warp < count; warp += 32) {
      released |= release_if_complete(warp, std::min(warp + 32, count), Waiting::kWarp);
    }
    released |= release_if_complete(0, count, Waiting::kBlock);
    if (!ran && !released) {
      std::fputs("host shim: a barrier was met by some threads of a block and never by the others\n", stderr);
      std::abort();
    }
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, const Args&... args) {
  grid_size = grid;
  block_size = block;
  body = [&] { kernel(args...); };
  for (unsigned int z = 0; z < grid.z; ++z) {
    for (unsigned int y = 0; y < grid.y; ++y) {
      for (unsigned int x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        run_block();
      }
    }
  }
}

template <class T>
T shuffle(T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(exchange[0]));
  const int warp = current / 32 * 32;
  std::memcpy(exchange[current], &value, sizeof(T));
  wait(Waiting::kWarp);
  std::memcpy(&value, exchange[warp + source_lane], sizeof(T));
  wait(Waiting::kWarp);
  return value;
}

}  // namespace u4d::host_shim

#define threadIdx (::u4d::host_shim::thread_index)
#define blockIdx (::u4d::host_shim::block_index)
#define blockDim (::u4d::host_shim::block_size)
#define gridDim (::u4d::host_shim::grid_size)

#define U4D_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), static_cast<void>(shared_bytes),     \
   ::u4d::host_shim::launch(kernel, (grid), (block), __VA_ARGS__))

inline void __syncthreads() { u4d::host_shim::wait(u4d::host_shim::Waiting::kBlock); }
inline void __syncwarp(unsigned int = 0xffffffffu) { u4d::host_shim::wait(u4d::host_shim::Waiting::kWarp); }

// Only full warps shuffle in this project, so the mask is not looked at.
template <class T>
T __shfl_sync(unsigned int, T value, int lane) {
  return u4d::host_shim::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned int, T value, int lane_mask) {
  return u4d::host_shim::shuffle(value, u4d::host_shim::current % 32 ^ lane_mask);
}
template <class T>
T __shfl_down_sync(unsigned int, T value, unsigned int delta) {
  const int lane = u4d::host_shim::current % 32;
  return u4d::host_shim::shuffle(value, lane + static_cast<int>(delta) < 32 ? lane + static_cast<int>(delta) : lane);
}
inline unsigned int __ballot_sync(unsigned int, int predicate) {
  unsigned int bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (u4d::host_shim::shuffle(predicate != 0, lane) ? 1u : 0u) << lane;
  return bits;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }

using std::fma;
using std::max;
using std::min;

namespace u4d {

inline Status launch_status() { return kOk; }

}  // namespace u4d

// The tests choose the order in which the threads of a block run.
extern "C" __attribute__((visibility("default"), used, weak)) void u4d_shim_last_thread_first(int value) {
  u4d::host_shim::last_thread_first = value != 0;
}
