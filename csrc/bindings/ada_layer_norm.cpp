#include "kernels/ada_layer_norm/ada_layer_norm.h"

#include "bindings/register.h"

void bind_ada_layer_norm(pybind11::module_& m) {
  u4d::def_cpu(m, "ada_layer_norm_cpu", &u4d::ada_layer_norm_cpu);
  u4d::def_cpu(m, "ada_layer_norm_grad_cpu", &u4d::ada_layer_norm_grad_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "ada_layer_norm_cuda", &u4d::ada_layer_norm_cuda);
  u4d::def_cuda(m, "ada_layer_norm_grad_cuda", &u4d::ada_layer_norm_grad_cuda);
#endif
}
