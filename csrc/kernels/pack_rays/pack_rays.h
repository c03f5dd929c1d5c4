// Writes the packed ray latents of pinhole cameras. Specification: u4d_fast/reference/pack_rays.py.
//
// Arguments of both launchers, all contiguous, float32:
//   intrinsics    [batch, frames, 3, 3]; only fx, skew, cx, fy, cy are read
//   cam_to_world  [batch, frames, 4, 4]
//   scale         [batch]; divides the centres
//   ray_dir, ray_moment  [batch, 16, latent_frames, rows, columns] out, every element is written
//   latent_frames = 1 for one frame, else 2 + ceil((frames - 2) / 4); a cell is 8x8 pixels
//
// Arithmetic is double. Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status pack_rays_cpu(int num_threads, const float* intrinsics, const float* cam_to_world, const float* scale,
                                float* ray_dir, float* ray_moment, std::int64_t batch, std::int64_t frames,
                                std::int64_t latent_frames, std::int64_t rows, std::int64_t columns);

U4D_KERNEL Status pack_rays_cuda(void* stream, const float* intrinsics, const float* cam_to_world, const float* scale,
                                 float* ray_dir, float* ray_moment, std::int64_t batch, std::int64_t frames,
                                 std::int64_t latent_frames, std::int64_t rows, std::int64_t columns);

}  // namespace u4d
