#include "kernels/unpack_rays/unpack_rays.h"

#include "kernels/common/launch.h"
#include "kernels/common/time_layout.h"

namespace u4d {
namespace {

constexpr int kThreads = 128;

// One thread per (frame, cell).
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const float* __restrict__ ray_dir, const float* __restrict__ ray_moment,
                  const float* __restrict__ scale, float* __restrict__ directions, float* __restrict__ moments,
                  std::int64_t frames, std::int64_t latent_frames, std::int64_t cells) {
  const std::int64_t cell = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (cell >= cells) return;
  const std::int64_t frame = blockIdx.y % frames, clip = blockIdx.y / frames;
  const Slots slots = slots_of(frame, frames);
  const std::int64_t plane = latent_frames * cells;
  const std::int64_t from = clip * kRayChannels * plane + slots.latent_frame * cells + cell;
  const std::int64_t to = static_cast<std::int64_t>(blockIdx.y) * 3 * cells + cell;
  const double share = 1.0 / (slots.last - slots.first + 1);
  const double moment_share = static_cast<double>(scale[clip]) * share;
  for (int k = 0; k < 3; ++k) {
    double direction = 0.0, moment = 0.0;
    for (int slot = slots.first; slot <= slots.last; ++slot) {
      direction += ray_dir[from + (3 * slot + k) * plane];
      moment += ray_moment[from + (3 * slot + k) * plane];
    }
    directions[to + k * cells] = static_cast<float>(direction * share);
    moments[to + k * cells] = static_cast<float>(moment * moment_share);
  }
}

}  // namespace

Status unpack_rays_cuda(void* stream, const float* ray_dir, const float* ray_moment, const float* scale,
                        float* directions, float* moments, std::int64_t batch, std::int64_t frames,
                        std::int64_t latent_frames, std::int64_t rows, std::int64_t columns) {
  if (batch < 0 || rows < 0 || columns < 0 || !is_layout(frames, latent_frames)) return kInvalidArgument;
  const std::int64_t cells = rows * columns;
  if (batch * cells == 0) return kOk;
  if (batch * frames > 65535) return kTooLarge;  // CUDA's limit of a grid's second dimension
  const dim3 grid(blocks_for(cells, kThreads), static_cast<unsigned int>(batch * frames));
  U4D_LAUNCH(unpack_kernel, grid, kThreads, 0, stream, ray_dir, ray_moment, scale, directions, moments, frames,
             latent_frames, cells);
  return launch_status();
}

}  // namespace u4d
