// Hopper's own instructions (sm_90a), one thin function each. All inline PTX of the project is in this file and in
// hopper_wgmma.h; the sections named are those of the PTX ISA manual.
//
// Under the host shim the same names come from hopper_shim.h, which emulates them on the CPU for the tests. A kernel
// that uses them must be plain C++ besides. It gets its dynamic shared memory by U4D_DYNAMIC_SHARED(name), which
// declares `unsigned char* name`, and takes tensor maps as `const __grid_constant__ CUtensorMap` parameters.
#pragma once

#ifdef U4D_HOST_SHIM
#include "kernels/common/hopper_shim.h"
#else

#include <cuda.h>  // CUtensorMap, a plain type; nothing of libcuda is called
#include <cuda_runtime.h>

#include <cstdint>

#define U4D_DYNAMIC_SHARED(name)                                \
  extern __shared__ __align__(1024) unsigned char name##_raw[]; \
  unsigned char* name = name##_raw

namespace u4d::hopper {

#define U4D_HOPPER __device__ __forceinline__

constexpr int kWarpgroup = 128;

// How 16-byte pieces are permuted inside rows of shared memory; the value is the descriptor's layout type ("Matrix
// descriptor"). k128Bytes: piece p of a 128-byte row r stands at place p ^ (r % 8).
enum class Swizzle : uint64_t { kNone = 0, k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };

// A generic pointer to shared memory as an address in the shared window ("cvta").
U4D_HOPPER uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// mbarrier: a phase ends when all arrivals and all expected bytes have come; its parity is 0, 1, 0, ...

// "mbarrier.init": by one thread, before any other use.
U4D_HOPPER void barrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// "membar / fence", fence.mbarrier_init: makes the inits visible to the copy engine; __syncthreads() follows.
U4D_HOPPER void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// "mbarrier.arrive": one arrival.
U4D_HOPPER void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// "mbarrier.arrive", .expect_tx: one arrival, and the phase waits for that many bytes more.
U4D_HOPPER void barrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// "mbarrier.try_wait": until the phase of this parity is over. A fresh barrier lets parity 1 pass. Compiled with
// U4D_FIND_HANGS, one that does not end ends the kernel with an error.
U4D_HOPPER void barrier_wait(uint64_t* barrier, unsigned parity) {
#ifdef U4D_FIND_HANGS
  for (unsigned tries = 0, done = 0; !done; ++tries) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (tries > 1u << 18) asm volatile("trap;");
  }
#else
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// "bar{.cta}", "barrier": `threads` threads meet at barrier `id` (1 to 15; 0 is __syncthreads'); whole warps only.
U4D_HOPPER void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "bar{.cta}", bar.arrive: counts as one of the threads that the others wait for, and goes on.
U4D_HOPPER void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "setmaxnreg": by all warps of a warpgroup. Gives registers back; takes them (waits until they are there).
template <int kRegisters>
U4D_HOPPER void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
U4D_HOPPER void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The copy engine. One thread issues; the bytes of the whole box count, also those outside the tensor, which read as 0.

// "prefetch", .tensormap: so that the first copy does not wait for the map itself.
U4D_HOPPER void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// "cp.async.bulk.tensor": the map's box at these coordinates (elements, the contiguous dimension first) -> shared
// memory, 128-byte aligned (1024 with Swizzle::k128Bytes), reported to the barrier.
U4D_HOPPER void tma_load_4d(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// "cp.async.bulk.tensor", to global memory: the map's box at these coordinates; what lies outside the tensor is not
// written. By one thread, after fence_async_shared() by all who wrote the shared memory.
U4D_HOPPER void tma_store_4d(const CUtensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// "cp.async.bulk.commit_group": this thread's stores since the last commit are one group.
U4D_HOPPER void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// "cp.async.bulk.wait_group", .read: until at most kPending of the youngest groups still read shared memory.
template <int kPending>
U4D_HOPPER void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// "cp.async.bulk.wait_group": until at most kPending of the youngest groups are under way; the others are written.
template <int kPending>
U4D_HOPPER void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// "fence.proxy", .async: by each thread that wrote shared memory which the copy engine or the tensor cores touch next.
U4D_HOPPER void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Warpgroup matrix products ("Asynchronous warpgroup level matrix instructions"): 128 threads compute
// d[64,N] (+)= a[64,16] b[16,N] from bfloat16 into float32. Thread t holds of d, for i = 0 .. N/8 - 1:
//   d[4 i + 0, 1]: row 16 (t / 32) + t % 32 / 4,     columns 8 i + 2 (t % 4) + 0, 1
//   d[4 i + 2, 3]: row 16 (t / 32) + t % 32 / 4 + 8, the same columns
// and of an a in registers, two bfloat16 each (the lower column in the lower half):
//   a0: that row, columns 2 (t % 4) + 0, 1;  a1: row + 8;  a2: the row, columns + 8;  a3: row + 8, columns + 8.

// "wgmma.fence": orders register and shared-memory accesses before the products that follow.
U4D_HOPPER void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group": the products since the last commit are one group.
U4D_HOPPER void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// "wgmma.wait_group": until at most kPending of the youngest groups are under way.
template <int kPending>
U4D_HOPPER void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: keeps the compiler from moving uses of registers that products under way write or read past here.
template <int kCount>
U4D_HOPPER void hold_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
U4D_HOPPER void hold_registers(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// "setp", "nanosleep": what follows comes after the instructions that lead to x. Without it ptxas moves a wgmma_wait()
// up over arithmetic that was meant to run while products do. It never sleeps: x is compared with a NaN that no
// arithmetic gives. A comparison that ptxas can decide it leaves out, and around a branch (a trap is one) it needs more
// registers.
U4D_HOPPER void order_after(float x) {
  asm volatile("{\n.reg .pred never;\nsetp.eq.b32 never, %0, 0x7fabcdef;\n@never nanosleep.u32 0;\n}\n" ::"r"(
      __float_as_uint(x)));
}

// "Matrix descriptor": where an operand lies in shared memory. With k128Bytes, rows are 128 bytes, 8 of them are 1024:
//   K-major (rows are rows of a, or columns of b, 64 elements of k long): stride_bytes = from 8 rows to the next 8
//     (1024); leading_bytes is not looked at. The next 16 of k are 32 bytes on.
//   MN-major (rows are k, 64 columns of b long): stride_bytes = from 8 k to the next 8 (1024), leading_bytes = from 64
//     columns to the next 64. The next 16 of k are 2048 bytes on.
U4D_HOPPER uint64_t shared_descriptor(const void* shared, unsigned leading_bytes, unsigned stride_bytes,
                                      Swizzle swizzle) {
  return (static_cast<uint64_t>(shared_address(shared)) & 0x3ffff) >> 4 |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

// The descriptor of the same layout that starts some bytes further on. The upper half does not change: one addition.
U4D_HOPPER uint64_t advance(uint64_t descriptor, unsigned bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// "ex2", .approx.ftz: 2^x, 2^-inf = 0.
U4D_HOPPER float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// "cvt", .rn.bf16x2: two floats as bfloat16, the first in the lower half.
U4D_HOPPER uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// "cvt", .rn.satfinite.e4m3x2: four floats as e4m3, the first in the lowest byte; beyond 448 they are 448.
U4D_HOPPER uint32_t pack_e4m3(float first, float second, float third, float fourth) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(packed)
      : "f"(first), "f"(second), "f"(third), "f"(fourth));
  return packed;
}

}  // namespace u4d::hopper

#include "kernels/common/hopper_wgmma.h"

#undef U4D_HOPPER
#endif
