#include "kernels/pack_rays/pack_rays.h"

#include "bindings/register.h"

void bind_pack_rays(pybind11::module_& m) {
  u4d::def_cpu(m, "pack_rays_cpu", &u4d::pack_rays_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "pack_rays_cuda", &u4d::pack_rays_cuda);
#endif
}
