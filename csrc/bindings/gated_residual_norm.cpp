#include "kernels/gated_residual_norm/gated_residual_norm.h"

#include "bindings/register.h"

void bind_gated_residual_norm(pybind11::module_& m) {
  u4d::def_cpu(m, "gated_residual_norm_cpu", &u4d::gated_residual_norm_cpu);
  u4d::def_cpu(m, "gated_residual_norm_grad_cpu", &u4d::gated_residual_norm_grad_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "gated_residual_norm_cuda", &u4d::gated_residual_norm_cuda);
  u4d::def_cuda(m, "gated_residual_norm_grad_cuda", &u4d::gated_residual_norm_grad_cuda);
#endif
}
