#include "kernels/gated_residual_norm_fp8/gated_residual_norm_fp8.h"

#include "bindings/register.h"

void bind_gated_residual_norm_fp8(pybind11::module_& m) {
  u4d::def_cpu(m, "gated_residual_norm_fp8_cpu", &u4d::gated_residual_norm_fp8_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "gated_residual_norm_fp8_cuda", &u4d::gated_residual_norm_fp8_cuda);
#endif
}
