#include "kernels/unpack_rays/unpack_rays.h"

#include "bindings/register.h"

void bind_unpack_rays(pybind11::module_& m) {
  u4d::def_cpu(m, "unpack_rays_cpu", &u4d::unpack_rays_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "unpack_rays_cuda", &u4d::unpack_rays_cuda);
#endif
}
