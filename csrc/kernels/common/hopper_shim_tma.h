// The copy engine of hopper_shim.h: tensor maps, barriers that count bytes, copies that come late.
//
// After the PTX ISA ("mbarrier", "cp.async.bulk.tensor", "Tensors") and the driver's text on cuTensorMapEncodeTiled.
#pragma once

#include <unordered_map>

#include "kernels/common/hopper_shim_fence.h"
#include "kernels/common/launch.h"

// The names of cuda.h and cuda_runtime.h that Hopper launchers use.

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B,
};
enum CUtensorMapL2promotion {
  CU_TENSOR_MAP_L2_PROMOTION_NONE,
  CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
using cuuint32_t = std::uint32_t;
using cuuint64_t = std::uint64_t;

struct alignas(64) CUtensorMap {
  std::uint32_t mark;
  std::uint8_t rank, element_bytes, swizzle;
  unsigned char* base;
  std::uint64_t sizes[5];    // elements, the contiguous dimension first
  std::uint64_t strides[5];  // bytes
  std::uint16_t box[5];
};
static_assert(sizeof(CUtensorMap) == 128);

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // few, so that a block of a persistent kernel works on more than one tile
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > u4d::host_shim::kSharedLimit) return cudaErrorInvalidValue;
  u4d::host_shim::allowed_shared[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

namespace u4d::hopper_shim {

using host_shim::fail;

constexpr std::uint32_t kMapMark = 0x7e4502ab;

// The place of a shared address after the permutation of 16-byte pieces inside rows of `span` bytes (0: none): address
// bits 4.. are flipped by the bits from 7 on, one for 32 bytes, two for 64, three for 128.
inline unsigned swizzled(unsigned address, unsigned span) {
  return address ^ ((address >> 7 & (span / 16 - (span != 0))) << 4);
}

}  // namespace u4d::hopper_shim

// Refuses what the driver's text refuses, and what this emulation does not know.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const unsigned element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8     ? 1
                                 : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4
                                                                           : 2;
  const unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16u << swizzle;
  const std::uintptr_t base = reinterpret_cast<std::uintptr_t>(address);
  if (reinterpret_cast<std::uintptr_t>(map) % 64 || base % 16 || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  *map = {u4d::hopper_shim::kMapMark,
          static_cast<std::uint8_t>(rank),
          static_cast<std::uint8_t>(element_bytes),
          static_cast<std::uint8_t>(span),
          static_cast<unsigned char*>(address),
          {},
          {element_bytes},
          {}};
  for (unsigned i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32 || box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;  // allowed by the driver; not emulated
    map->sizes[i] = sizes[i];
    map->box[i] = static_cast<std::uint16_t>(box[i]);
    if (i == 0) continue;
    if (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
    map->strides[i] = strides[i - 1];
  }
  const unsigned row = box[0] * element_bytes;
  if (row % 16 || (span && row > span)) return CUDA_ERROR_INVALID_VALUE;
  if (span && row < span) return CUDA_ERROR_INVALID_VALUE;  // allowed by the driver; not emulated
  return CUDA_SUCCESS;
}

namespace u4d::hopper_shim {

inline unsigned shared_offset(const void* pointer, std::size_t bytes, const char* what) {
  const auto offset = static_cast<const unsigned char*>(pointer) - host_shim::dynamic_shared;
  if (offset < 0 || offset + static_cast<std::ptrdiff_t>(bytes) > host_shim::dynamic_bytes) {
    fail("%s does not lie in the %d bytes of dynamic shared memory", what, host_shim::dynamic_bytes);
  }
  return static_cast<unsigned>(offset);
}

// Barriers ("mbarrier").

constexpr std::uint64_t kBarrierMark = 0xba881e50ba881e50;  // stands in the object; the state is here
constexpr std::int64_t kMaxCount = (1 << 20) - 1;           // of arrivals, and of bytes under way

struct Barrier {
  unsigned arrivals, missing;
  std::int64_t bytes = 0;
  unsigned phase = 0;
};
inline std::unordered_map<const void*, Barrier> barriers;
inline bool barriers_fenced = false;

inline std::string name_of(const void* barrier) {
  char text[80];
  const auto offset = static_cast<const unsigned char*>(barrier) - host_shim::dynamic_shared;
  const bool inside = offset >= 0 && offset < host_shim::kSharedLimit;
  if (inside) std::snprintf(text, sizeof(text), "the barrier at shared byte %td", offset);
  if (!inside) std::snprintf(text, sizeof(text), "the barrier at %p", barrier);
  return text;
}

inline Barrier& barrier_at(std::uint64_t* address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("%s is used before barrier_init", name_of(address).c_str());
  if (*address != kBarrierMark) fail("%s was overwritten", name_of(address).c_str());
  return found->second;
}

inline void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
}

inline void arrive(std::uint64_t* address, std::int64_t expected_bytes) {
  Barrier& barrier = barrier_at(address);
  if (barrier.missing == 0) {
    fail("%s gets more than its %u arrivals while its phase %u waits for %lld bytes", name_of(address).c_str(),
         barrier.arrivals, barrier.phase, static_cast<long long>(barrier.bytes));
  }
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMaxCount) fail("%s expects more bytes than it can count", name_of(address).c_str());
  --barrier.missing;
  end_phase_if_complete(barrier);
}

// Copies: what both directions have in common.

struct Box {
  CUtensorMap map;
  unsigned shared, bytes;
  int at[5];

  unsigned row_bytes() const { return map.box[0] * map.element_bytes; }
  unsigned rows() const { return bytes / row_bytes(); }
  bool meets(const Box& other) const { return shared < other.shared + other.bytes && other.shared < shared + bytes; }
};

// Copies into shared memory.
struct Load {
  Box box;
  std::uint64_t* barrier;
};
inline std::vector<Load> loads;
inline std::uint32_t random_state = 1;

inline std::size_t box_bytes(const CUtensorMap& map) {
  std::size_t bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

template <int kRank>
Box box_at(const void* shared, const CUtensorMap* map, const int (&at)[kRank], const char* end) {
  if (map->mark != kMapMark) fail("a copy's tensor map was not made by cuTensorMapEncodeTiled");
  if (map->rank != kRank) fail("a %dd copy of a tensor map of rank %d", kRank, map->rank);
  Box box{*map, 0, static_cast<unsigned>(box_bytes(*map)), {}};
  box.shared = shared_offset(shared, box.bytes, end);
  std::copy(at, at + kRank, box.at);
  const unsigned alignment = map->swizzle ? map->swizzle * 8u : 128u;  // where the permutation's pattern begins
  if (box.shared % alignment) fail("%s %u is not aligned to %u bytes", end, box.shared, alignment);
  for (const Load& other : loads) {
    if (box.meets(other.box)) {
      fail("two copies under way in the same shared memory, from byte %u and %u on", other.box.shared, box.shared);
    }
  }
  return box;
}

// Where the box's row `row` begins in global memory, were its first column 0; nullptr for a row outside the tensor.
inline unsigned char* row_at(const Box& box, unsigned row) {
  const CUtensorMap& map = box.map;
  unsigned char* at = map.base;
  for (unsigned i = 1, rest = row; i < map.rank; rest /= map.box[i++]) {
    const std::int64_t index = box.at[i] + static_cast<std::int64_t>(rest % map.box[i]);
    if (index < 0 || index >= static_cast<std::int64_t>(map.sizes[i])) return nullptr;
    at += index * static_cast<std::int64_t>(map.strides[i]);
  }
  return at;
}

// Bytes of a row of the box that are inside the tensor: from `first`, before `last`, at `offset` in the tensor's row.
struct Inside {
  unsigned first, last;
  std::int64_t offset;
};

inline Inside inside_of_row(const Box& box) {
  const std::int64_t size = static_cast<std::int64_t>(box.map.sizes[0]), at = box.at[0];
  const std::int64_t first = std::max<std::int64_t>(-at, 0), last = std::min<std::int64_t>(size - at, box.map.box[0]);
  if (first >= last) return {0, 0, 0};
  const unsigned bytes = box.map.element_bytes;
  return {static_cast<unsigned>(first) * bytes, static_cast<unsigned>(last) * bytes, (at + first) * bytes};
}

void check_not_being_read(const Box& box);  // hopper_shim_store.h

// One thread asks for a copy: from here until the copy comes, its destination reads as NaN.
template <int kRank>
void issue_load(void* shared, const CUtensorMap* map, std::uint64_t* barrier, const int (&at)[kRank]) {
  if (!barriers_fenced) fail("a copy without fence_barrier_init after the last barrier_init");
  barrier_at(barrier);
  const Box box = box_at(shared, map, at, "a copy's destination");
  check_not_being_read(box);
  std::vector<unsigned char> nothing(box.bytes);
  host_shim::poison(nothing.data(), box.bytes);
  write_both_views(box.shared, nothing.data(), box.bytes);
  loads.push_back({box, barrier});
}

// Writes the box's row `row`, pieces of 16 bytes where the permutation wants them; zeros outside the tensor.
inline void copy_row(const Box& box, unsigned row) {
  const Inside inside = inside_of_row(box);
  unsigned char bytes[256 * 4] = {};
  if (const unsigned char* from = row_at(box, row)) {
    std::memcpy(bytes + inside.first, from + inside.offset, inside.last - inside.first);
  }
  for (unsigned piece = 0; piece < box.row_bytes(); piece += 16) {
    const unsigned to = swizzled(box.shared + row * box.row_bytes() + piece, box.map.swizzle);
    write_both_views(to, bytes + piece, 16);
  }
}

inline bool still_poisoned(const Box& box) {
  std::vector<unsigned char> expected(box.bytes);
  host_shim::poison(expected.data(), box.bytes);
  return std::memcmp(expected.data(), host_shim::dynamic_shared + box.shared, box.bytes) == 0;
}

inline std::size_t random_below(std::size_t count) {
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) % count;
}

// One of the copies under way comes.
inline void perform_load(std::size_t chosen) {
  const Load load = loads[chosen];
  loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(chosen));
  if (!still_poisoned(load.box))
    fail("shared memory from byte %u on was written while a copy into it was under way", load.box.shared);
  for (unsigned row = 0; row < load.box.rows(); ++row) copy_row(load.box, row);
  Barrier& barrier = barrier_at(load.barrier);
  barrier.bytes -= load.box.bytes;
  if (barrier.bytes < 0) {
    fail("%s got %lld bytes more than were expected in its phase %u", name_of(load.barrier).c_str(),
         static_cast<long long>(-barrier.bytes), barrier.phase);
  }
  end_phase_if_complete(barrier);
}

}  // namespace u4d::hopper_shim

// The tests choose the order in which copies come.
extern "C" __attribute__((visibility("default"), used, weak)) void u4d_shim_seed(unsigned int seed) {
  u4d::hopper_shim::random_state = seed;
}
