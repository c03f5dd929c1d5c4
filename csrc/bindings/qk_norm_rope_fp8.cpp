#include "kernels/qk_norm_rope_fp8/qk_norm_rope_fp8.h"

#include "bindings/register.h"

void bind_qk_norm_rope_fp8(pybind11::module_& m) {
  u4d::def_cpu(m, "qk_norm_rope_fp8_cpu", &u4d::qk_norm_rope_fp8_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "qk_norm_rope_fp8_cuda", &u4d::qk_norm_rope_fp8_cuda);
#endif
}
