#include "kernels/bias_gelu_fp8/bias_gelu_fp8.h"

#include "bindings/register.h"

void bind_bias_gelu_fp8(pybind11::module_& m) {
  u4d::def_cpu(m, "bias_gelu_fp8_cpu", &u4d::bias_gelu_fp8_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "bias_gelu_fp8_cuda", &u4d::bias_gelu_fp8_cuda);
#endif
}
