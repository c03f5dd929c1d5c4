// Fits pinhole cameras to ray maps. The method is described in u4d_fast/reference/rays_to_cameras.py, its
// specification.
//
// Arguments of both launchers, all contiguous, float32:
//   directions, moments  [batch, frames, 3, rows, columns]; a cell with a non-finite number in either, or without
//                        direction, has no weight
//   known_intrinsics     [batch, frames, 3, 3], or null where intrinsics are to be fitted
//   intrinsics           [batch, frames, 3, 3] out (known ones are copied)
//   cam_to_world         [batch, frames, 4, 4] out
//   residual             [batch, frames] out: RMS angle in radians over the cells with weight, inf where no camera was
//   found; that
//                        frame's camera is then the identity with the clip's or a 60 degree camera's intrinsics
//   workspace            rays_to_cameras_workspace(...) bytes, aligned to 16, contents don't matter
//   image_height, image_width   pixels; a cell is 8x8 pixels, rows = image_height / 8
//   options              sum of the kOption values
//
// Arithmetic is double. The same input gives the same bits, for any number of threads. Nothing is allocated and nothing
// waited for.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

constexpr std::int64_t kOptionSharedIntrinsics = 1;
constexpr std::int64_t kOptionSquarePixels = 2;
constexpr std::int64_t kOptionRobust = 4;

U4D_KERNEL std::int64_t rays_to_cameras_workspace(std::int64_t batch, std::int64_t frames, std::int64_t rows,
                                                  std::int64_t columns);

U4D_KERNEL Status rays_to_cameras_cpu(int num_threads, const float* directions, const float* moments,
                                      const float* known_intrinsics, float* intrinsics, float* cam_to_world,
                                      float* residual, void* workspace, std::int64_t batch, std::int64_t frames,
                                      std::int64_t rows, std::int64_t columns, std::int64_t image_height,
                                      std::int64_t image_width, std::int64_t options);

U4D_KERNEL Status rays_to_cameras_cuda(void* stream, const float* directions, const float* moments,
                                       const float* known_intrinsics, float* intrinsics, float* cam_to_world,
                                       float* residual, void* workspace, std::int64_t batch, std::int64_t frames,
                                       std::int64_t rows, std::int64_t columns, std::int64_t image_height,
                                       std::int64_t image_width, std::int64_t options);

}  // namespace u4d
