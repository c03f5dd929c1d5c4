#include "kernels/warp_frames/warp_frames.h"

#include "bindings/register.h"

void bind_warp_frames(pybind11::module_& m) {
  u4d::def_cpu(m, "warp_frames_cpu", &u4d::warp_frames_cpu);
  u4d::def_cpu(m, "warp_frames_depth_grad_cpu", &u4d::warp_frames_depth_grad_cpu);
  u4d::def_cpu(m, "warp_frames_rgb_grad_cpu", &u4d::warp_frames_rgb_grad_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "warp_frames_cuda", &u4d::warp_frames_cuda);
  u4d::def_cuda(m, "warp_frames_depth_grad_cuda", &u4d::warp_frames_depth_grad_cuda);
  u4d::def_cuda(m, "warp_frames_rgb_grad_cuda", &u4d::warp_frames_rgb_grad_cuda);
#endif
}
