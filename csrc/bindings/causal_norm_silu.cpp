#include "kernels/causal_norm_silu/causal_norm_silu.h"

#include "bindings/register.h"

void bind_causal_norm_silu(pybind11::module_& m) {
  u4d::def_cpu(m, "causal_norm_silu_cpu", &u4d::causal_norm_silu_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "causal_norm_silu_cuda", &u4d::causal_norm_silu_cuda);
#endif
}
