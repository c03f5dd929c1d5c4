#include "kernels/reprojection_error/reprojection_error.h"

#include "bindings/register.h"

void bind_reprojection_error(pybind11::module_& m) {
  u4d::def_cpu(m, "reprojection_error_cpu", &u4d::reprojection_error_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "reprojection_error_cuda", &u4d::reprojection_error_cuda);
#endif
}
