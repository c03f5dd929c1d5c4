// Checks a launcher's arguments and lays out the workspace; the same for both devices.
#pragma once

#include "kernels/rays_to_cameras/frame_state.h"
#include "kernels/rays_to_cameras/rays_to_cameras.h"

namespace u4d::rays_to_cameras_detail {

inline std::int64_t padded_cells(std::int64_t rows, std::int64_t columns) {
  return (rows * columns + kLanes - 1) / kLanes * kLanes;
}

inline Status lay_out(const float* directions, const float* moments, const float* known, float* intrinsics,
                      float* cam_to_world, float* residual, void* workspace, std::int64_t batch, std::int64_t frames,
                      std::int64_t rows, std::int64_t columns, std::int64_t image_height, std::int64_t image_width,
                      std::int64_t options, Problem& problem) {
  const bool sizes_fit = batch >= 0 && frames >= 0 && rows > 0 && columns > 0;
  if (!sizes_fit || image_height != rows * kCell || image_width != columns * kCell) return kInvalidArgument;
  if (rows * columns > (std::int64_t{1} << 30)) return kTooLarge;
  problem.directions = directions;
  problem.moments = moments;
  problem.known_intrinsics = known;
  problem.intrinsics = intrinsics;
  problem.cam_to_world = cam_to_world;
  problem.residual = residual;
  problem.states = static_cast<FrameState*>(workspace);
  problem.all_frames = batch * frames;
  problem.fields = reinterpret_cast<double*>(problem.states + problem.all_frames);
  const bool shared = (options & kOptionSharedIntrinsics) != 0 && known == nullptr;
  problem.group = shared ? frames : 1;
  problem.rows = rows;
  problem.columns = columns;
  problem.padded = padded_cells(rows, columns);
  problem.image_height = static_cast<double>(image_height);
  problem.image_width = static_cast<double>(image_width);
  problem.robust = (options & kOptionRobust) != 0;
  problem.square = (options & kOptionSquarePixels) != 0;
  return kOk;
}

}  // namespace u4d::rays_to_cameras_detail
