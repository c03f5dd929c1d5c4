#include "kernels/unpack_rays/unpack_rays.h"

#include "kernels/common/time_layout.h"
#include "kernels/common/vectorise.h"

namespace u4d {
namespace {

// The mean of a number of copies, `apart` elements from one to the next, times `factor`. The number is a constant for
// the compiler: a loop over copies inside the loop over cells would not be vectorised.
template <int copies>
U4D_INLINE void average_of(const float* from, std::int64_t apart, double factor, std::int64_t cells, float* to) {
  const double share = factor / copies;
#pragma GCC ivdep
  for (std::int64_t cell = 0; cell < cells; ++cell) {
    double total = 0.0;
    for (int copy = 0; copy < copies; ++copy) total += from[copy * apart + cell];
    to[cell] = static_cast<float>(total * share);
  }
}

// One coordinate of one frame.
U4D_CLONES void average(const float* from, int copies, std::int64_t apart, double factor, std::int64_t cells,
                        float* to) {
  if (copies == 1) return average_of<1>(from, apart, factor, cells, to);
  if (copies == 2) return average_of<2>(from, apart, factor, cells, to);
  if (copies == 3) return average_of<3>(from, apart, factor, cells, to);
  average_of<kSlots>(from, apart, factor, cells, to);
}

}  // namespace

Status unpack_rays_cpu(int num_threads, const float* ray_dir, const float* ray_moment, const float* scale,
                       float* directions, float* moments, std::int64_t batch, std::int64_t frames,
                       std::int64_t latent_frames, std::int64_t rows, std::int64_t columns) {
  if (batch < 0 || rows < 0 || columns < 0 || !is_layout(frames, latent_frames)) return kInvalidArgument;
  const std::int64_t cells = rows * columns, plane = latent_frames * cells;
#pragma omp parallel for num_threads(num_threads) if (batch * frames * cells > 4096)
  for (std::int64_t i = 0; i < batch * frames; ++i) {
    const std::int64_t clip = i / frames;
    const Slots slots = slots_of(i % frames, frames);
    const int copies = slots.last - slots.first + 1;
    for (int k = 0; k < 3; ++k) {
      const std::int64_t from = (clip * kRayChannels + 3 * slots.first + k) * plane + slots.latent_frame * cells;
      const std::int64_t to = (3 * i + k) * cells;
      average(ray_dir + from, copies, 3 * plane, 1.0, cells, directions + to);
      average(ray_moment + from, copies, 3 * plane, scale[clip], cells, moments + to);
    }
  }
  return kOk;
}

}  // namespace u4d
