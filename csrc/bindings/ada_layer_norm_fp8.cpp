#include "kernels/ada_layer_norm_fp8/ada_layer_norm_fp8.h"

#include "bindings/register.h"

void bind_ada_layer_norm_fp8(pybind11::module_& m) {
  u4d::def_cpu(m, "ada_layer_norm_fp8_cpu", &u4d::ada_layer_norm_fp8_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "ada_layer_norm_fp8_cuda", &u4d::ada_layer_norm_fp8_cuda);
#endif
}
