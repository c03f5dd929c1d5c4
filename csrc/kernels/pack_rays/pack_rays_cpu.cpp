#include "kernels/pack_rays/pack_rays.h"

#include <algorithm>

#include "kernels/common/time_layout.h"
#include "kernels/common/vectorise.h"
#include "kernels/pack_rays/cell_ray.h"

namespace u4d {
namespace {

using namespace pack_rays_detail;

// One row of cells into the three planes of each output, `plane` elements apart.
U4D_CLONES void row_of_rays(const Camera& camera, double row, std::int64_t columns, std::int64_t plane, float* ray_dir,
                            float* ray_moment) {
#pragma GCC ivdep
  for (std::int64_t column = 0; column < columns; ++column) {
    float ray[6];
    cell_ray(camera, row, static_cast<double>(column), ray);
    for (int i = 0; i < 3; ++i) {
      ray_dir[i * plane + column] = ray[i];
      ray_moment[i * plane + column] = ray[3 + i];
    }
  }
}

// All slots that hold one frame.
void pack_frame(const Camera& camera, const Slots& slots, std::int64_t rows, std::int64_t columns, std::int64_t plane,
                float* ray_dir, float* ray_moment) {
  float* first[] = {ray_dir + 3 * slots.first * plane, ray_moment + 3 * slots.first * plane};
  for (std::int64_t row = 0; row < rows; ++row) {
    row_of_rays(camera, static_cast<double>(row), columns, plane, first[0] + row * columns, first[1] + row * columns);
  }
  for (int slot = slots.first + 1; slot <= slots.last; ++slot) {
    for (float* from : first) {
      float* to = from + 3 * (slot - slots.first) * plane;
      for (int i = 0; i < 3; ++i) std::copy_n(from + i * plane, rows * columns, to + i * plane);
    }
  }
}

}  // namespace

Status pack_rays_cpu(int num_threads, const float* intrinsics, const float* cam_to_world, const float* scale,
                     float* ray_dir, float* ray_moment, std::int64_t batch, std::int64_t frames,
                     std::int64_t latent_frames, std::int64_t rows, std::int64_t columns) {
  if (batch < 0 || rows < 0 || columns < 0 || !is_layout(frames, latent_frames)) return kInvalidArgument;
  const std::int64_t cells = rows * columns;
  const std::int64_t plane = latent_frames * cells;  // from one channel to the next
#pragma omp parallel for num_threads(num_threads) if (batch * frames * cells > 4096)
  for (std::int64_t i = 0; i < batch * frames; ++i) {
    const std::int64_t clip = i / frames;
    const Slots slots = slots_of(i % frames, frames);
    const std::int64_t offset = clip * kRayChannels * plane + slots.latent_frame * cells;
    const Camera camera = read_camera(intrinsics + 9 * i, cam_to_world + 16 * i, scale[clip]);
    pack_frame(camera, slots, rows, columns, plane, ray_dir + offset, ray_moment + offset);
  }
  for (std::int64_t clip = 0; clip < batch; ++clip) {
    const std::int64_t offset = (clip * kRayChannels + 3 * kSlots) * plane;
    std::fill_n(ray_dir + offset, (kRayChannels - 3 * kSlots) * plane, 0.0f);
    std::fill_n(ray_moment + offset, (kRayChannels - 3 * kSlots) * plane, 0.0f);
  }
  return kOk;
}

}  // namespace u4d
