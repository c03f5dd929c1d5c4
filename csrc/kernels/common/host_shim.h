// Runs CUDA kernels without inline PTX on the CPU, so that a machine without GPU can test them. Tests only.
// (hopper_shim.h adds Hopper's own instructions.)
//
// Every thread of a block is a fiber. A fiber runs until it meets a barrier (__syncthreads, __syncwarp, a shuffle) or
// ends; then the next one runs. Blocks run one after the other. Running the threads of a block first to last and again
// last to first shows a missing barrier: with it the results agree, without it one of the two reads stale memory.
// What it cannot show: races between blocks, memory ordering, the cost of anything.
//
// A kernel that does what no GPU would survive makes launch_status() return kShimFailure; the reason goes to stderr.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common/status.h"

#define __global__ static
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace u4d::host_shim {

constexpr Status kShimFailure = -99;

enum class Waiting { kNo, kWarp, kBlock, kOther };

// Emulates more than CUDA C++: other things to wait for, and work that goes on beside the threads.
struct Extension {
  virtual void begin_launch() = 0;
  virtual void end_launch() = 0;
  virtual void begin_block(int threads) = 0;
  virtual void end_block() = 0;
  virtual void ran(int thread) = 0;  // until it waits, or ends
  // Whether that for which this thread waits (Waiting::kOther) has come.
  virtual bool ready(int thread) = 0;
  // No thread can run: does one piece of the work under way. False where there is none.
  virtual bool advance() = 0;
  virtual std::string waits_for(int thread) = 0;
};
inline Extension* extension = nullptr;

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

constexpr int kSharedLimit = 227 * 1024, kSharedDefault = 48 * 1024;  // bytes of dynamic shared memory of a block
alignas(1024) inline unsigned char dynamic_shared[kSharedLimit];
inline int dynamic_bytes = 0;
inline std::map<const void*, int> allowed_shared;  // by kernel, from cudaFuncSetAttribute

// Bytes that read as NaN in bfloat16, float16 and float32: what nobody has written yet.
constexpr std::uint16_t kPoison = 0x7fc1;
inline void poison(unsigned char* bytes, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<unsigned char>(kPoison >> 8 * (i % 2));
}

inline std::string failure;
inline bool in_fiber = false;
struct Failed {};

// Ends the launch. What the threads hold on their stacks is lost, which a test can bear.
[[noreturn]] inline void fail(const char* format, ...) {
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  failure = text;
  if (in_fiber) {
    char who[80];
    std::snprintf(who, sizeof(who), "block %u, thread %d: ", block_index.x, current);
    failure = who + failure;
    _longjmp(scheduler, 1);
  }
  throw Failed{};
}

inline void enter() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

inline void run_current() {
  Fiber& fiber = fibers[current];
  in_fiber = true;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  in_fiber = false;
  if (!failure.empty()) throw Failed{};
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

inline std::string waits_for(int thread) {
  switch (fibers[thread].waiting) {
    case Waiting::kWarp:
      return "for the other threads of their warp (__syncwarp, a shuffle)";
    case Waiting::kBlock:
      return "at __syncthreads";
    case Waiting::kOther:
      return extension->waits_for(thread);
    default:
      return "for nothing";
  }
}

// Says which threads wait for what, neighbours that wait for the same together.
[[noreturn]] inline void report_deadlock(int count) {
  std::string text = "deadlock: a barrier was met by some threads of a block and never by the others";
  for (int first = 0, last = 0; first < count; first = last) {
    const std::string what = fibers[first].done ? "" : waits_for(first);
    for (last = first + 1; last < count && what == (fibers[last].done ? "" : waits_for(last));) ++last;
    if (fibers[first].done) continue;
    text += "\n  threads " + std::to_string(first) + " to " + std::to_string(last - 1) + " wait " + what;
  }
  fail("%s", text.c_str());
}

inline void prepare_block(int count) {
  constexpr std::size_t kStack = 256 * 1024;
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
  poison(dynamic_shared, dynamic_bytes);
}

inline void run_block() {
  const int count = static_cast<int>(block_size.x * block_size.y * block_size.z);
  prepare_block(count);
  if (extension) extension->begin_block(count);
  for (;;) {
    bool ran = false, all_done = true;
    for (int k = 0; k < count; ++k) {
      current = last_thread_first ? count - 1 - k : k;
      Fiber& fiber = fibers[current];
      if (fiber.done) continue;
      all_done = false;
      if (fiber.waiting == Waiting::kOther && extension->ready(current)) fiber.waiting = Waiting::kNo;
      if (fiber.waiting != Waiting::kNo) continue;
      thread_index = fiber.index;
      run_current();
      if (extension) extension->ran(current);
      ran = true;
    }
    if (all_done) break;
    bool released = false;
    for (int warp = 0; warp < count; warp += 32) {
      released |= release_if_complete(warp, std::min(warp + 32, count), Waiting::kWarp);
    }
    released |= release_if_complete(0, count, Waiting::kBlock);
    if (!ran && !released && !(extension && extension->advance())) report_deadlock(count);
  }
  if (extension) extension->end_block();
}

inline void check_shared_memory(const void* kernel, int bytes) {
  const int allowed = allowed_shared.count(kernel) ? allowed_shared[kernel] : kSharedDefault;
  if (bytes > allowed) fail("%d bytes of shared memory, but the kernel was allowed %d", bytes, allowed);
  dynamic_bytes = bytes;
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, int shared_bytes, const Args&... args) {
  grid_size = grid;
  block_size = block;
  body = [&] { kernel(args...); };
  failure.clear();
  try {
    check_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (extension) extension->begin_launch();
    for (unsigned int z = 0; z < grid.z; ++z) {
      for (unsigned int y = 0; y < grid.y; ++y) {
        for (unsigned int x = 0; x < grid.x; ++x) {
          block_index = {x, y, z};
          run_block();
        }
      }
    }
    if (extension) extension->end_launch();
  } catch (const Failed&) {
    std::fprintf(stderr, "host shim: %s\n", failure.c_str());
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
  (static_cast<void>(stream),                                      \
   ::u4d::host_shim::launch(kernel, (grid), (block), static_cast<int>(shared_bytes), __VA_ARGS__))

#define U4D_DYNAMIC_SHARED(name) unsigned char* name = ::u4d::host_shim::dynamic_shared

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

inline Status launch_status() { return host_shim::failure.empty() ? kOk : host_shim::kShimFailure; }

}  // namespace u4d

// Why the last launch failed; empty where it did not.
extern "C" __attribute__((visibility("default"), used, weak)) const char* u4d_shim_failure() {
  return u4d::host_shim::failure.c_str();
}

// The tests choose the order in which the threads of a block run.
extern "C" __attribute__((visibility("default"), used, weak)) void u4d_shim_last_thread_first(int value) {
  u4d::host_shim::last_thread_first = value != 0;
}
