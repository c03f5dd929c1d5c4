#include "kernels/rays_to_cameras/rays_to_cameras.h"

#include "bindings/register.h"

void bind_rays_to_cameras(pybind11::module_& m) {
  m.def("rays_to_cameras_workspace", &u4d::rays_to_cameras_workspace);
  u4d::def_cpu(m, "rays_to_cameras_cpu", &u4d::rays_to_cameras_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "rays_to_cameras_cuda", &u4d::rays_to_cameras_cuda);
#endif
}
