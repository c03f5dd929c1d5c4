// Host side of Hopper kernels: tensor maps for the copy engine, blocks with much shared memory, the number of SMs.
#pragma once

#include <cstdint>

#include "kernels/common/hopper.h"
#include "kernels/common/launch.h"
#include "kernels/common/status.h"

namespace u4d {

// What a tensor map describes: four dimensions, the contiguous one first. Sizes and strides in elements; strides[0] is
// 1, the others are multiples of 16 bytes, and so is the address. `box` is what one copy brings; its first side is one
// row of shared memory: 128 bytes (64 bfloat16, 128 e4m3), permuted as Swizzle::k128Bytes, or 64 as k64Bytes.
struct TensorLayout {
  int64_t sizes[4];
  int64_t strides[4];
  int box[4];
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;  // or ..._UINT8, which stands for e4m3
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
  const cuuint64_t element_bytes = layout.type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  for (int i = 0; i < 4; ++i) {
    sizes[i] = static_cast<cuuint64_t>(layout.sizes[i]);
    box[i] = static_cast<cuuint32_t>(layout.box[i]);
    steps[i] = 1;
    if (i) strides[i - 1] = static_cast<cuuint64_t>(layout.strides[i]) * element_bytes;
  }
  const CUtensorMapSwizzle swizzle =
      box[0] * element_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUresult result =
      encode(map, layout.type, 4, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
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
