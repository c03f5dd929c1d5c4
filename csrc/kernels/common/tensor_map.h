// Host side of Hopper kernels: tensor maps for the copy engine, blocks with much shared memory, the number of SMs.
#pragma once

#include <cstdint>

#include "kernels/common/hopper.h"
#include "kernels/common/launch.h"
#include "kernels/common/status.h"

namespace u4d {

// What a tensor map describes: bfloat16, four dimensions, the contiguous one first. Sizes and strides in elements;
// strides[0] is 1, the others are multiples of 8 (16 bytes), and so is the address. `box` is what one copy brings; its
// first side is 64 elements, one 128-byte row of shared memory, permuted as Swizzle::k128Bytes.
struct TensorLayout {
  int64_t sizes[4];
  int64_t strides[4];
  int box[4];
};

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time: the module is not linked against libcuda, which a machine may lack.
inline Status find_encode_tiled(EncodeTiled* function) {
#ifdef U4D_HOST_SHIM
  *function = cuTensorMapEncodeTiled;
#else
  static EncodeTiled known = nullptr;
  if (!known) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return static_cast<Status>(error);
    if (result != cudaDriverEntryPointSuccess || !found) return static_cast<Status>(cudaErrorNotSupported);
    known = reinterpret_cast<EncodeTiled>(found);
  }
  *function = known;
#endif
  return kOk;
}

inline Status encode_tensor_map(CUtensorMap* map, const void* data, const TensorLayout& layout) {
  EncodeTiled encode;
  if (Status status = find_encode_tiled(&encode)) return status;
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4], steps[4];
  for (int i = 0; i < 4; ++i) {
    sizes[i] = static_cast<cuuint64_t>(layout.sizes[i]);
    box[i] = static_cast<cuuint32_t>(layout.box[i]);
    steps[i] = 1;
    if (i) strides[i - 1] = static_cast<cuuint64_t>(layout.strides[i]) * 2;
  }
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  // CUresult and cudaError_t number the common errors alike (1: invalid value).
  return static_cast<Status>(result);
}

// A block gets more than 48 KB of dynamic shared memory only after this.
template <class Kernel>
Status allow_shared_memory(Kernel kernel, int bytes) {
  return static_cast<Status>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

inline Status count_multiprocessors(int* count) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return static_cast<Status>(error);
  return static_cast<Status>(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

}  // namespace u4d
