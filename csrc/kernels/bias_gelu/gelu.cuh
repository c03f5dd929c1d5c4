// The tanh form of GELU on a GPU.
#pragma once

#include "kernels/bias_gelu/bias_gelu.h"
#include "kernels/common/launch.h"

namespace u4d {

__device__ __forceinline__ float gelu(float v) { return __fdividef(v, 1.0f + expf(gelu_exponent(v))); }

}  // namespace u4d
