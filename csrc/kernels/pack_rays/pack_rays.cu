#include "kernels/pack_rays/pack_rays.h"

#include "kernels/common/launch.h"
#include "kernels/common/time_layout.h"
#include "kernels/pack_rays/cell_ray.h"

namespace u4d {
namespace {

using namespace pack_rays_detail;

constexpr int kThreads = 128;

// One thread per (frame, cell): neighbouring threads write neighbouring cells of each plane.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const float* __restrict__ intrinsics, const float* __restrict__ cam_to_world,
                const float* __restrict__ scale, float* __restrict__ ray_dir, float* __restrict__ ray_moment,
                std::int64_t frames, std::int64_t latent_frames, std::int64_t rows, std::int64_t columns) {
  const std::int64_t cells = rows * columns;
  const std::int64_t cell = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (cell >= cells) return;
  const std::int64_t frame = blockIdx.y % frames, clip = blockIdx.y / frames;
  const std::int64_t row = cell / columns, column = cell - row * columns;
  const std::int64_t camera_index = blockIdx.y;

  float ray[6];
  const Camera camera = read_camera(intrinsics + 9 * camera_index, cam_to_world + 16 * camera_index, scale[clip]);
  cell_ray(camera, static_cast<double>(row), static_cast<double>(column), ray);

  const Slots slots = slots_of(frame, frames);
  const std::int64_t plane = latent_frames * cells;
  const std::int64_t offset = clip * kRayChannels * plane + slots.latent_frame * cells + cell;
  for (int slot = slots.first; slot <= slots.last; ++slot) {
    for (int i = 0; i < 3; ++i) {
      ray_dir[offset + (3 * slot + i) * plane] = ray[i];
      ray_moment[offset + (3 * slot + i) * plane] = ray[3 + i];
    }
  }
  if (slots.first == 0) {  // every latent frame has exactly one frame in its first slot
    for (int channel = 3 * kSlots; channel < kRayChannels; ++channel) {
      ray_dir[offset + channel * plane] = 0.0f;
      ray_moment[offset + channel * plane] = 0.0f;
    }
  }
}

}  // namespace

Status pack_rays_cuda(void* stream, const float* intrinsics, const float* cam_to_world, const float* scale,
                      float* ray_dir, float* ray_moment, std::int64_t batch, std::int64_t frames,
                      std::int64_t latent_frames, std::int64_t rows, std::int64_t columns) {
  if (batch < 0 || rows < 0 || columns < 0 || !is_layout(frames, latent_frames)) return kInvalidArgument;
  const std::int64_t cells = rows * columns;
  if (batch * cells == 0) return kOk;
  if (batch * frames > 65535) return kTooLarge;  // CUDA's limit of a grid's second dimension
  const dim3 grid(blocks_for(cells, kThreads), static_cast<unsigned int>(batch * frames));
  U4D_LAUNCH(pack_kernel, grid, kThreads, 0, stream, intrinsics, cam_to_world, scale, ray_dir, ray_moment, frames,
             latent_frames, rows, columns);
  return launch_status();
}

}  // namespace u4d
