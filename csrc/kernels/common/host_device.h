// For code that a CPU kernel and a CUDA kernel share.
#pragma once

#include "kernels/common/vectorise.h"

#if defined(__CUDACC__)
#define U4D_HD __device__ __forceinline__
#define U4D_HD_CALL __device__ inline
#else
#define U4D_HD U4D_INLINE
#define U4D_HD_CALL inline
#endif
