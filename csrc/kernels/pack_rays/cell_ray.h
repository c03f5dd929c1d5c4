// The ray through the middle of a latent cell, in double; shared by the CPU and the CUDA kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/host_device.h"

namespace u4d::pack_rays_detail {

constexpr double kCell = 8.0;  // pixels

struct Camera {
  double inverse_fx, inverse_fy, skew, cx, cy;
  double r[9], o[3];
};

U4D_HD Camera read_camera(const float* k, const float* pose, float scale) {
  Camera c;
  c.inverse_fx = 1.0 / k[0], c.skew = k[1], c.cx = k[2], c.inverse_fy = 1.0 / k[4], c.cy = k[5];
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) c.r[3 * i + j] = pose[4 * i + j];
    c.o[i] = static_cast<double>(pose[4 * i + 3]) / scale;
  }
  return c;
}

// out[0..2] = unit direction, out[3..5] = moment o x d.
U4D_HD void cell_ray(const Camera& c, double row, double column, float* out) {
  const double y = (kCell * (row + 0.5) - c.cy) * c.inverse_fy;
  const double x = (kCell * (column + 0.5) - c.cx - c.skew * y) * c.inverse_fx;
  const double wx = c.r[0] * x + c.r[1] * y + c.r[2], wy = c.r[3] * x + c.r[4] * y + c.r[5],
               wz = c.r[6] * x + c.r[7] * y + c.r[8];
  const double inverse = 1.0 / std::sqrt(wx * wx + wy * wy + wz * wz);
  const double dx = wx * inverse, dy = wy * inverse, dz = wz * inverse;
  out[0] = static_cast<float>(dx), out[1] = static_cast<float>(dy), out[2] = static_cast<float>(dz);
  out[3] = static_cast<float>(c.o[1] * dz - c.o[2] * dy);
  out[4] = static_cast<float>(c.o[2] * dx - c.o[0] * dz);
  out[5] = static_cast<float>(c.o[0] * dy - c.o[1] * dx);
}

}  // namespace u4d::pack_rays_detail
