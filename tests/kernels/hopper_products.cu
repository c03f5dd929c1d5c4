// A matrix product in every way that hopper.h offers, with one mistake of choice: what test_hopper_shim.py runs.
//
// d[64,N] = a[64,K] b[K,N], K in tiles of one row of kSpan bytes. Warpgroup 0 multiplies, thread 128 brings the tiles,
// the others give their registers away.
#include "kernels/common/hopper.h"
#include "kernels/common/launch.h"

namespace u4d {
namespace {

using namespace hopper;

enum Mistake {
  kNone,
  kWrongSwizzle,
  kWrongStride,
  kNoProductWait,
  kWrongParity,
  kNoTileWait,
  kNoStageWait,
  kStageGivenBackEarly,
  kTooFewBytes,
  kTooManyBytes,
  kNoProductFence,
  kAccumulatorWritten,
  kThreeWarps,
  kDifferentProducts,
  kArrivalForgotten,
  kArrivalTooMany,
  kNoInitFence,
  kUnaligned,
  kRegistersOfOneWarp,
  kTooManyRegisters,
  kNoAsyncFence,
  kStageWritten,
  kNamedBarrierForgotten,
  kNamedBarrierCount,
  kCopyNotWaitedFor,
  kBarrierOverwritten,
  kSharedMemoryNotAllowed,
};

constexpr int kRowsA = 64, kStages = 2;

// b K-major with a from shared memory, or b MN-major with a from registers; rows of kSpan bytes (0: no permutation,
// the tile is then written by ordinary stores in pieces of 8 x 16 bytes).
template <bool kFromRegisters, int kSpan>
struct Plan {
  static constexpr int kColumns = kFromRegisters ? 128 : 160;
  static constexpr int kRow = kSpan ? kSpan / 2 : 16;        // elements in a row of shared memory
  static constexpr int kDepth = kFromRegisters ? 32 : kRow;  // of a tile
  static constexpr int kBytesA = kFromRegisters ? 0 : kRowsA * kDepth * 2;
  static constexpr int kBytesB = kColumns * kDepth * 2;
  static constexpr int kStage = kBytesA + kBytesB;
  static constexpr int kShared = kStages * kStage + 1024;
  static constexpr Swizzle kSwizzle = kSpan == 128  ? Swizzle::k128Bytes
                                      : kSpan == 64 ? Swizzle::k64Bytes
                                      : kSpan == 32 ? Swizzle::k32Bytes
                                                    : Swizzle::kNone;
};

struct Problem {
  const uint16_t* a;  // [64,K]
  const uint16_t* b;  // [N,K], or [K,N] where it is MN-major
  float* d;           // [64,N]
  int depth, tiles, mistake;
};

template <class P, bool kFromRegisters>
__device__ void load_tile(unsigned char* stage, const CUtensorMap* map_a, const CUtensorMap* map_b, uint64_t* full,
                          int tile) {
  if constexpr (kFromRegisters) {
    for (int column = 0; column < P::kColumns; column += P::kRow) {  // k rows of kRow columns
      tma_load_4d(stage + column * P::kDepth * 2, map_b, full, column, tile * P::kDepth, 0, 0);
    }
  } else {
    tma_load_4d(stage, map_a, full, tile * P::kDepth, 0, 0, 0);
    tma_load_4d(stage + P::kBytesA, map_b, full, tile * P::kDepth, 0, 0, 0);
  }
}

template <bool kFromRegisters, int kSpan>
__device__ void produce(unsigned char* shared, const CUtensorMap* map_a, const CUtensorMap* map_b, uint64_t* full,
                        uint64_t* empty, const Problem& problem) {
  using P = Plan<kFromRegisters, kSpan>;
  const int mistake = problem.mistake;
  for (int tile = 0; tile < problem.tiles + (mistake == kCopyNotWaitedFor); ++tile) {
    const int stage = tile % kStages, turn = tile / kStages % 2;
    if (mistake != kNoStageWait) barrier_wait(&empty[stage], turn ^ 1);
    barrier_arrive_expect(&full[stage], P::kStage + (mistake == kTooManyBytes) * 16 - (mistake == kTooFewBytes) * 16);
    load_tile<P, kFromRegisters>(shared + stage * P::kStage + (mistake == kUnaligned) * 64, map_a, map_b, &full[stage],
                                 tile);
    if (mistake == kStageWritten && tile == 1) shared[stage * P::kStage + 7] = 1;
    if (mistake == kBarrierOverwritten && tile == 1) full[0] = 0;
  }
}

// Two neighbouring elements of a row of a.
__device__ inline uint32_t pair_of(const Problem& problem, int row, int depth) {
  const uint16_t* from = problem.a + row * problem.depth + depth;
  return depth < problem.depth ? from[0] | static_cast<uint32_t>(from[1]) << 16 : 0;
}

template <bool kFromRegisters, int kSpan>
__device__ void multiply_tile(float (&d)[Plan<kFromRegisters, kSpan>::kColumns / 2], const unsigned char* stage,
                              const Problem& problem, int tile) {
  using P = Plan<kFromRegisters, kSpan>;
  const int mistake = problem.mistake, thread = threadIdx.x;
  const Swizzle swizzle = mistake != kWrongSwizzle ? P::kSwizzle : kSpan == 64 ? Swizzle::k128Bytes : Swizzle::k64Bytes;
  constexpr unsigned kGroup = kSpan ? 8 * kSpan : 128;  // bytes of 8 rows
  const unsigned wrong = mistake == kWrongStride ? 16 : 0;
  // Without permutation the pieces of 8 x 16 bytes stand one after the other along k first (by write_tile).
  const unsigned stride_a = kSpan ? kGroup : P::kDepth / 8 * kGroup, leading_a = kSpan ? 16 : kGroup;
  const unsigned stride_b = kFromRegisters && !kSpan ? kGroup : stride_a;
  const unsigned leading_b = !kFromRegisters ? leading_a : kSpan ? P::kDepth * kSpan : P::kColumns / 8 * kGroup;
  if (mistake != kNoProductFence) wgmma_fence();
#pragma unroll
  for (int step = 0; step < P::kDepth / 16; ++step) {
    const int on = tile + step > 0;
    if constexpr (kFromRegisters) {
      const uint64_t b = advance(shared_descriptor(stage, leading_b + wrong, stride_b, swizzle),
                                 step * 2 * (kSpan ? kGroup : leading_b));
      const int row = thread / 32 * 16 + thread % 32 / 4, depth = tile * P::kDepth + step * 16 + thread % 4 * 2;
      wgmma_registers<P::kColumns>(d, pair_of(problem, row, depth), pair_of(problem, row + 8, depth),
                                   pair_of(problem, row, depth + 8), pair_of(problem, row + 8, depth + 8), b, on);
    } else {
      const unsigned by = step * (kSpan ? 32 : 2 * kGroup);
      const int other = mistake == kDifferentProducts && thread == 5 ? 32 : 0;
      const uint64_t a = shared_descriptor(stage, leading_a, stride_a, swizzle);
      const uint64_t b = shared_descriptor(stage + P::kBytesA, leading_b, stride_b + wrong, swizzle);
      wgmma_shared<P::kColumns>(d, advance(a, by + other), advance(b, by), on);
    }
  }
  wgmma_commit();
}

template <bool kFromRegisters, int kSpan>
__device__ void consume(const unsigned char* shared, uint64_t* full, uint64_t* empty, const Problem& problem) {
  using P = Plan<kFromRegisters, kSpan>;
  const int mistake = problem.mistake, thread = threadIdx.x;
  float d[P::kColumns / 2];
  for (int i = 0; i < P::kColumns / 2; ++i) d[i] = 5;
  for (int tile = 0; tile < problem.tiles; ++tile) {
    const int stage = tile % kStages, turn = tile / kStages % 2;
    if (mistake != kNoTileWait) barrier_wait(&full[stage], turn ^ (mistake == kWrongParity));
    if (mistake == kThreeWarps && thread >= 96) return;
    multiply_tile<kFromRegisters, kSpan>(d, shared + stage * P::kStage, problem, tile);
    if (mistake == kAccumulatorWritten && tile == 1) d[3] += 1;
    if (mistake == kStageGivenBackEarly) barrier_arrive(&empty[stage]);
    if (mistake != kNoProductWait) wgmma_wait<0>();
    hold_registers(d);
    if (mistake == kArrivalForgotten && thread == 77 && tile == 1) continue;
    if (mistake != kStageGivenBackEarly) barrier_arrive(&empty[stage]);
    if (mistake == kArrivalTooMany && thread == 0 && tile == 0) barrier_arrive(&full[stage]);
  }
  if (mistake == kNamedBarrierForgotten && thread >= 64) return;
  named_barrier_sync(1, mistake == kNamedBarrierCount && thread >= 64 ? 64 : 128);
  for (int i = 0; i < P::kColumns / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
    problem.d[row * P::kColumns + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
  }
}

template <bool kFromRegisters, int kSpan>
__global__ void __launch_bounds__(384, 1)
    pipelined_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                     const Problem problem) {
  U4D_DYNAMIC_SHARED(shared);
  __shared__ uint64_t full[kStages], empty[kStages];
  const int thread = threadIdx.x, mistake = problem.mistake;
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], kWarpgroup);
    }
    if (mistake != kNoInitFence) fence_barrier_init();
  }
  __syncthreads();
  if (thread < kWarpgroup) {
    registers_increase<240>();
    consume<kFromRegisters, kSpan>(shared, full, empty, problem);
  } else {
    const int giving = mistake == kTooManyRegisters ? 0 : mistake == kRegistersOfOneWarp ? 32 : 2 * kWarpgroup;
    if (thread < kWarpgroup + giving) registers_decrease<24>();
    if (thread == kWarpgroup) produce<kFromRegisters, kSpan>(shared, &map_a, &map_b, full, empty, problem);
  }
}

// Ordinary stores write the tile in the layout without permutation: pieces of 8 rows of 16 bytes, one after the other.
template <bool kFromRegisters>
__device__ void write_tile(unsigned char* shared, const Problem& problem, int tile) {
  using P = Plan<kFromRegisters, 0>;
  uint16_t* to = reinterpret_cast<uint16_t*>(shared);
  for (int i = threadIdx.x; !kFromRegisters && i < kRowsA * P::kDepth; i += kWarpgroup) {
    const int row = i / P::kDepth, depth = i % P::kDepth;
    to[(row / 8 * (P::kDepth / 8) + depth / 8) * 64 + row % 8 * 8 + depth % 8] =
        problem.a[row * problem.depth + tile * P::kDepth + depth];
  }
  to += P::kBytesA / 2;
  for (int i = threadIdx.x; i < P::kColumns * P::kDepth; i += kWarpgroup) {
    const int column = i / P::kDepth, depth = i % P::kDepth, k = tile * P::kDepth + depth;
    if (kFromRegisters) {
      to[(depth / 8 * (P::kColumns / 8) + column / 8) * 64 + depth % 8 * 8 + column % 8] =
          problem.b[k * P::kColumns + column];
    } else {
      to[(column / 8 * (P::kDepth / 8) + depth / 8) * 64 + column % 8 * 8 + depth % 8] =
          problem.b[column * problem.depth + k];
    }
  }
}

template <bool kFromRegisters>
__global__ void __launch_bounds__(kWarpgroup, 1) stored_kernel(const Problem problem) {
  using P = Plan<kFromRegisters, 0>;
  U4D_DYNAMIC_SHARED(shared);
  float d[P::kColumns / 2];
  for (int tile = 0; tile < problem.tiles; ++tile) {
    write_tile<kFromRegisters>(shared, problem, tile);
    if (problem.mistake != kNoAsyncFence) fence_async_shared();
    __syncthreads();
    multiply_tile<kFromRegisters, 0>(d, shared, problem, tile);
    wgmma_wait<0>();
    __syncthreads();
  }
  const int thread = threadIdx.x;
  for (int i = 0; i < P::kColumns / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
    problem.d[row * P::kColumns + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
  }
}

CUresult encode(CUtensorMap* map, const uint16_t* data, cuuint64_t width, cuuint64_t height, cuuint32_t box_width,
                cuuint32_t box_height, int span) {
  const cuuint64_t sizes[] = {width, height, 1, 1}, strides[] = {width * 2, width * height * 2, width * height * 2};
  const cuuint32_t box[] = {box_width, box_height, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = span == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : span == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                  : CU_TENSOR_MAP_SWIZZLE_32B;
  return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<uint16_t*>(data), sizes, strides,
                                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <bool kFromRegisters, int kSpan>
Status run(void* stream, Problem problem, std::int64_t columns) {
  using P = Plan<kFromRegisters, kSpan>;
  problem.tiles = (problem.depth + P::kDepth - 1) / P::kDepth;
  if constexpr (kSpan == 0) {
    cudaFuncSetAttribute(stored_kernel<kFromRegisters>, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kShared);
    U4D_LAUNCH(stored_kernel<kFromRegisters>, 1, kWarpgroup, P::kShared, stream, problem);
  } else {
    CUtensorMap map_a, map_b;
    if (encode(&map_a, problem.a, problem.depth, kRowsA, P::kRow, kRowsA, kSpan)) return kInvalidArgument;
    const bool ok = kFromRegisters ? !encode(&map_b, problem.b, columns, problem.depth, P::kRow, P::kDepth, kSpan)
                                   : !encode(&map_b, problem.b, problem.depth, columns, P::kRow, P::kColumns, kSpan);
    if (!ok) return kInvalidArgument;
    const auto kernel = pipelined_kernel<kFromRegisters, kSpan>;
    const int allowed = problem.mistake == kSharedMemoryNotAllowed ? 1024 : P::kShared;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    U4D_LAUNCH(kernel, 1, 3 * kWarpgroup, P::kShared, stream, map_a, map_b, problem);
  }
  return launch_status();
}

}  // namespace

// columns: of b that exist; the others are outside the tensor. d: [64,160], or [64,128] where a comes from registers.
U4D_KERNEL Status hopper_products(void* stream, const std::uint16_t* a, const std::uint16_t* b, float* d,
                                  std::int64_t depth, std::int64_t columns, std::int64_t from_registers,
                                  std::int64_t span, std::int64_t mistake) {
  const Problem problem{a, b, d, static_cast<int>(depth), 0, static_cast<int>(mistake)};
  if (from_registers) {
    if (span == 128) return run<true, 128>(stream, problem, columns);
    if (span == 64) return run<true, 64>(stream, problem, columns);
    if (span == 32) return run<true, 32>(stream, problem, columns);
    return run<true, 0>(stream, problem, columns);
  }
  if (span == 128) return run<false, 128>(stream, problem, columns);
  if (span == 64) return run<false, 64>(stream, problem, columns);
  if (span == 32) return run<false, 32>(stream, problem, columns);
  return run<false, 0>(stream, problem, columns);
}

}  // namespace u4d
