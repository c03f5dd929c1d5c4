// Backward warp of frames i into the views of frames j through depth and cameras, and its gradients in colour and
// depth. The geometry is in pair_geometry.h.
//
// All arrays are contiguous float32 unless said otherwise; pixel centres at .5; any sizes >= 0, height * width < 2^31:
//   rgb           [batch, frames, 3, height, width]
//   depth         [batch, frames, height, width]    along the optical axis; invalid: not finite or not positive
//   intrinsics    [batch, frames, 3, 3]             last row 0 0 1
//   cam_to_world  [batch, frames, 4, 4]             last row 0 0 0 1
//   pairs         int64 [pairs, 2]                  (i, j); a pair that names no frame sees nothing
//   occlusion     relative tolerance of the occlusion test, negative: no test
//   geometry      [batch, pairs, 12]                scratch
//   warped        [batch, pairs, 3, height, width]  0 where not valid
//   valid         uint8 [batch, pairs, height, width]
//   grad_warped   like warped; what stands at pixels that are not valid is not used
//
// A pixel of j is valid if its depth is, if it lies in front of camera i, lands between the centres of the outermost
// pixels of i (so that all four bilinear taps exist), and is not behind the depth of the nearest pixel of i by more
// than the tolerance. Which pixels are valid has no gradient.
//
// Launchers allocate nothing and do not synchronise. Every output element is written. The same input gives the same
// bits, for any number of threads and on the GPU, gradients included.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status warp_frames_cpu(int threads, const float* rgb, const float* depth, const float* intrinsics,
                                  const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames,
                                  int64_t height, int64_t width, int64_t num_pairs, double occlusion, float* geometry,
                                  float* warped, uint8_t* valid);
U4D_KERNEL Status warp_frames_cuda(void* stream, const float* rgb, const float* depth, const float* intrinsics,
                                   const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames,
                                   int64_t height, int64_t width, int64_t num_pairs, double occlusion, float* geometry,
                                   float* warped, uint8_t* valid);

// grad_depth [batch, frames, height, width]: depth of j moves the position in i. The depth of i only hides, and gets
// none.
U4D_KERNEL Status warp_frames_depth_grad_cpu(int threads, const float* grad_warped, const float* rgb,
                                             const float* depth, const float* intrinsics, const float* cam_to_world,
                                             const int64_t* pairs, int64_t batch, int64_t frames, int64_t height,
                                             int64_t width, int64_t num_pairs, double occlusion, float* geometry,
                                             float* grad_depth);
U4D_KERNEL Status warp_frames_depth_grad_cuda(void* stream, const float* grad_warped, const float* rgb,
                                              const float* depth, const float* intrinsics, const float* cam_to_world,
                                              const int64_t* pairs, int64_t batch, int64_t frames, int64_t height,
                                              int64_t width, int64_t num_pairs, double occlusion, float* geometry,
                                              float* grad_depth);

// grad_rgb [batch, frames, 3, height, width]: the bilinear weights, scattered. The CPU adds in a fixed order and uses
// neither of the two arguments before grad_rgb. The GPU adds 64-bit integers, whose sum does not depend on the order:
//   largest  [1]                    largest |grad_warped| of all pixels, the integers' unit; not finite: all NaN
//   sums     int64, like grad_rgb   scratch
U4D_KERNEL Status warp_frames_rgb_grad_cpu(int threads, const float* grad_warped, const float* depth,
                                           const float* intrinsics, const float* cam_to_world, const int64_t* pairs,
                                           int64_t batch, int64_t frames, int64_t height, int64_t width,
                                           int64_t num_pairs, double occlusion, float* geometry, const float* largest,
                                           int64_t* sums, float* grad_rgb);
U4D_KERNEL Status warp_frames_rgb_grad_cuda(void* stream, const float* grad_warped, const float* depth,
                                            const float* intrinsics, const float* cam_to_world, const int64_t* pairs,
                                            int64_t batch, int64_t frames, int64_t height, int64_t width,
                                            int64_t num_pairs, double occlusion, float* geometry, const float* largest,
                                            int64_t* sums, float* grad_rgb);

}  // namespace u4d
