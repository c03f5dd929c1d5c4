#include "kernels/qk_norm_rope/qk_norm_rope.h"

#include "bindings/register.h"

void bind_qk_norm_rope(pybind11::module_& m) {
  u4d::def_cpu(m, "qk_norm_rope_cpu", &u4d::qk_norm_rope_cpu);
  u4d::def_cpu(m, "qk_norm_rope_grad_cpu", &u4d::qk_norm_rope_grad_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "qk_norm_rope_cuda", &u4d::qk_norm_rope_cuda);
  u4d::def_cuda(m, "qk_norm_rope_grad_cuda", &u4d::qk_norm_rope_grad_cuda);
#endif
}
