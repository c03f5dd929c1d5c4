#include "kernels/bias_gelu/bias_gelu.h"

#include "bindings/register.h"

void bind_bias_gelu(pybind11::module_& m) {
  u4d::def_cpu(m, "bias_gelu_cpu", &u4d::bias_gelu_cpu);
  u4d::def_cpu(m, "bias_gelu_grad_cpu", &u4d::bias_gelu_grad_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "bias_gelu_cuda", &u4d::bias_gelu_cuda);
  u4d::def_cuda(m, "bias_gelu_grad_cuda", &u4d::bias_gelu_grad_cuda);
#endif
}
