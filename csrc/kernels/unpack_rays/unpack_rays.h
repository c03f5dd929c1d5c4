// Reads one ray map per frame out of packed ray latents. Specification: u4d_fast/reference/unpack_rays.py.
//
// Arguments of both launchers, all contiguous, float32:
//   ray_dir, ray_moment  [batch, 16, latent_frames, rows, columns]
//   scale                [batch]; multiplies the moments
//   directions, moments  [batch, frames, 3, rows, columns] out
//   latent_frames = 1 for one frame, else 2 + ceil((frames - 2) / 4)
//
// Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status unpack_rays_cpu(int num_threads, const float* ray_dir, const float* ray_moment, const float* scale,
                                  float* directions, float* moments, std::int64_t batch, std::int64_t frames,
                                  std::int64_t latent_frames, std::int64_t rows, std::int64_t columns);

U4D_KERNEL Status unpack_rays_cuda(void* stream, const float* ray_dir, const float* ray_moment, const float* scale,
                                   float* directions, float* moments, std::int64_t batch, std::int64_t frames,
                                   std::int64_t latent_frames, std::int64_t rows, std::int64_t columns);

}  // namespace u4d
