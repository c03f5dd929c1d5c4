// Products of e4m3 and copies out of shared memory, with one mistake of choice: what test_hopper_fp8_shim.py runs.
//
// d[64,C] = a[64,K] b[K,C]: one warpgroup, K in tiles of 128 bytes, C in tiles of kColumns that leave by the copy
// engine through two buffers in turn.
#include "kernels/common/hopper.h"
#include "kernels/common/launch.h"

namespace u4d {
namespace {

using namespace hopper;

enum Mistake {
  kNone,
  kWrongStep,
  kNoStoreFence,
  kFenceOfOneThread,
  kNoReadWait,
  kReadWaitUnseen,
  kReadWaitTooLax,
  kLoadedOver,
  kNotCommitted,
  kNoWaitAtEnd,
  kNoWriteWait,
  kUnalignedSource,
  kBytesSwapped,
};

constexpr int kRows = 64, kDepth = 128, kBuffers = 2;

// A row of a buffer is kSpan bytes, permuted, in boxes side by side; with kSpan = 0 it is a whole row of the tile.
template <int kColumns, int kSpan>
struct Plan {
  static constexpr int kBytesA = kRows * kDepth, kBytesB = kColumns * kDepth;
  static constexpr int kBox = kSpan ? kSpan / 4 : kColumns;  // columns of one copy
  static constexpr int kBuffer = kRows * kColumns * 4;
  static constexpr int kShared = kBytesA + kBytesB + kBuffers * kBuffer;
};

struct Problem {
  const unsigned char* a;  // [64,K]
  float* echo;             // [1]: d[0,0] as the kernel reads it at its end
  const float* d;
  int tiles, column_tiles, depth, mistake;
};

__device__ inline uint32_t four_of(const Problem& problem, int row, int depth) {
  uint32_t bytes = 0;
  for (int i = 3; i >= 0; --i) {
    const bool inside = depth + i < problem.depth;
    bytes = bytes << 8 | (inside ? problem.a[row * problem.depth + depth + i] : 0);
  }
  return bytes;
}

template <bool kFromRegisters, class P, int kColumns>
__device__ void multiply_tile(float (&d)[kColumns / 2], const unsigned char* shared, const Problem& problem, int tile) {
  const int thread = threadIdx.x, row = thread / 32 * 16 + thread % 32 / 4;
  const int further = problem.mistake == kWrongStep ? 64 : 32;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 32; ++step) {
    const uint64_t b =
        advance(shared_descriptor(shared + P::kBytesA, 0, 1024, Swizzle::k128Bytes), step * further % kDepth);
    const int on = tile + step > 0;
    if constexpr (kFromRegisters) {
      const int depth = tile * kDepth + step * 32 + thread % 4 * 4, swapped = problem.mistake == kBytesSwapped ? 8 : 0;
      wgmma_registers_e4m3<kColumns>(d, four_of(problem, row, depth), four_of(problem, row + 8, depth ^ swapped),
                                     four_of(problem, row, depth + 16), four_of(problem, row + 8, depth + 16), b, on);
    } else {
      const uint64_t a = shared_descriptor(shared, 0, 1024, Swizzle::k128Bytes);
      wgmma_shared_e4m3<kColumns>(d, advance(a, step * 32), b, on);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold_registers(d);
}

// d into a buffer: boxes of kBox columns one after the other.
template <class P, int kColumns, int kSpan>
__device__ void write_buffer(unsigned char* buffer, const float (&d)[kColumns / 2]) {
  const int thread = threadIdx.x;
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    unsigned at = (column / P::kBox * kRows + row) * P::kBox * 4 + column % P::kBox * 4;
    if (kSpan) at ^= (at >> 7 & 7) << 4;
    *reinterpret_cast<float*>(buffer + at) = d[i];
  }
}

template <class P, int kColumns>
__device__ void store_buffer(const CUtensorMap* map_d, unsigned char* buffer, int column_tile, int mistake) {
  for (int column = 0; column < kColumns; column += P::kBox) {
    const int off = mistake == kUnalignedSource ? 16 : 0;
    tma_store_4d(map_d, buffer + column * kRows * 4 + off, column_tile * kColumns + column, 0, 0, 0);
  }
  if (mistake != kNotCommitted) store_commit();
}

template <bool kFromRegisters, int kColumns, int kSpan>
__global__ void __launch_bounds__(kWarpgroup, 1)
    fp8_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
               const __grid_constant__ CUtensorMap map_d, const Problem problem) {
  using P = Plan<kColumns, kSpan>;
  U4D_DYNAMIC_SHARED(shared);
  __shared__ uint64_t full;
  const int thread = threadIdx.x, mistake = problem.mistake;
  if (thread == 0) {
    barrier_init(&full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  float d[kColumns / 2];
  for (int column_tile = 0, turn = 0; column_tile < problem.column_tiles; ++column_tile) {
    for (int tile = 0; tile < problem.tiles; ++tile, turn ^= 1) {
      if (thread == 0) {
        barrier_arrive_expect(&full, P::kBytesA + P::kBytesB);
        tma_load_4d(shared, &map_a, &full, tile * kDepth, 0, 0, 0);
        tma_load_4d(shared + P::kBytesA, &map_b, &full, tile * kDepth, column_tile * kColumns, 0, 0);
      }
      barrier_wait(&full, turn);
      multiply_tile<kFromRegisters, P, kColumns>(d, shared, problem, tile);
      __syncthreads();
    }
    unsigned char* buffer = shared + P::kBytesA + P::kBytesB + column_tile % kBuffers * P::kBuffer;
    if (mistake == kLoadedOver) buffer = shared;
    if (thread == 0 && mistake == kReadWaitTooLax) store_wait_read<kBuffers>();
    if (thread == 0 && mistake != kNoReadWait && mistake != kReadWaitTooLax) store_wait_read<kBuffers - 1>();
    if (mistake != kReadWaitUnseen) __syncthreads();
    write_buffer<P, kColumns, kSpan>(buffer, d);
    if (mistake != kNoStoreFence && mistake != kFenceOfOneThread) fence_async_shared();
    __syncthreads();
    if (mistake == kFenceOfOneThread && thread == 0) fence_async_shared();
    if (thread == 0) store_buffer<P, kColumns>(&map_d, buffer, column_tile, mistake);
  }
  if (thread == 0) {
    if (mistake != kNoWaitAtEnd && mistake != kNoWriteWait) store_wait<0>();
    if (mistake == kNoWriteWait) store_wait_read<0>();
    if (problem.column_tiles) *problem.echo = *reinterpret_cast<const volatile float*>(problem.d);
  }
}

__global__ void __launch_bounds__(kWarpgroup) pack_kernel(const float* from, uint32_t* to, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = pack_e4m3(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
}

CUresult encode(CUtensorMap* map, const void* data, CUtensorMapDataType type, int bytes, cuuint64_t width,
                cuuint64_t height, cuuint32_t box_width, cuuint32_t box_height, bool permuted) {
  const cuuint64_t row = width * static_cast<cuuint64_t>(bytes), sizes[] = {width, height, 1, 1};
  const cuuint64_t strides[] = {row, row * height, row * height};
  const cuuint32_t box[] = {box_width, box_height, 1, 1}, steps[] = {1, 1, 1, 1};
  return cuTensorMapEncodeTiled(map, type, 4, const_cast<void*>(data), sizes, strides, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE,
                                permuted ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <bool kFromRegisters, int kColumns, int kSpan>
Status run(void* stream, Problem problem, const unsigned char* b, float* d, int rows, int columns) {
  using P = Plan<kColumns, kSpan>;
  problem.tiles = (problem.depth + kDepth - 1) / kDepth;
  problem.column_tiles = (columns + kColumns - 1) / kColumns;
  CUtensorMap map_a, map_b, map_d;
  const auto bytes = CU_TENSOR_MAP_DATA_TYPE_UINT8, floats = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (encode(&map_a, problem.a, bytes, 1, problem.depth, kRows, kDepth, kRows, true) ||
      encode(&map_b, b, bytes, 1, problem.depth, columns, kDepth, kColumns, true) ||
      encode(&map_d, d, floats, 4, columns, rows, P::kBox, kRows, kSpan != 0)) {
    return kInvalidArgument;
  }
  const auto kernel = fp8_kernel<kFromRegisters, kColumns, kSpan>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kShared);
  U4D_LAUNCH(kernel, 1, kWarpgroup, P::kShared, stream, map_a, map_b, map_d, problem);
  return launch_status();
}

}  // namespace

// a [64,depth], b [columns,depth], both e4m3; d [rows,columns], rows <= 64: the others are outside its tensor map.
U4D_KERNEL Status hopper_fp8(void* stream, const unsigned char* a, const unsigned char* b, float* d, float* echo,
                             std::int64_t depth, std::int64_t rows, std::int64_t columns, std::int64_t from_registers,
                             std::int64_t span, std::int64_t mistake) {
  const Problem problem{a, echo, d, 0, 0, static_cast<int>(depth), static_cast<int>(mistake)};
  const int height = static_cast<int>(rows), width = static_cast<int>(columns);
  if (from_registers && span) return run<true, 64, 128>(stream, problem, b, d, height, width);
  if (from_registers) return run<true, 128, 0>(stream, problem, b, d, height, width);
  if (span) return run<false, 160, 128>(stream, problem, b, d, height, width);
  return run<false, 64, 0>(stream, problem, b, d, height, width);
}

// to: `count` times four e4m3.
U4D_KERNEL Status hopper_pack_e4m3(void* stream, const float* from, std::uint32_t* to, std::int64_t count) {
  const int packed = static_cast<int>(count);
  U4D_LAUNCH(pack_kernel, blocks_for(count, kWarpgroup), kWarpgroup, 0, stream, from, to, packed);
  return launch_status();
}

}  // namespace u4d
