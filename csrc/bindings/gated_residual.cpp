#include "kernels/gated_residual/gated_residual.h"

#include "bindings/register.h"

void bind_gated_residual(pybind11::module_& m) {
  u4d::def_cpu(m, "gated_residual_cpu", &u4d::gated_residual_cpu);
  u4d::def_cpu(m, "gated_residual_grad_cpu", &u4d::gated_residual_grad_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "gated_residual_cuda", &u4d::gated_residual_cuda);
  u4d::def_cuda(m, "gated_residual_grad_cuda", &u4d::gated_residual_grad_cuda);
#endif
}
