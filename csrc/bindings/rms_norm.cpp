#include "kernels/rms_norm/rms_norm.h"

#include "bindings/register.h"

void bind_rms_norm(pybind11::module_& m) {
  u4d::def_cpu(m, "rms_norm_cpu", &u4d::rms_norm_cpu);
  u4d::def_cpu(m, "rms_norm_grad_cpu", &u4d::rms_norm_grad_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "rms_norm_cuda", &u4d::rms_norm_cuda);
  u4d::def_cuda(m, "rms_norm_grad_cuda", &u4d::rms_norm_grad_cuda);
#endif
}
