// The steps of a frame's fit that go over its cells, written once for both devices. A Team is what works on one frame:
// a thread with vector registers on the CPU, a block of threads on the GPU. It offers
//   each(count, f)            f(cell) for every cell
//   sum<K>(count, out, f)     out[k] = sum over cells of t[k], where f(cell, t) sets t[0..K)
//   once(f)                   f() on one thread; its writes are seen by all afterwards
// Every loop that sums is free of branches, so that compilers vectorise it.
#pragma once

#include <cmath>

#include "kernels/common/host_device.h"
#include "kernels/rays_to_cameras/frame_state.h"
#include "kernels/rays_to_cameras/small_matrices.h"

namespace u4d::rays_to_cameras_detail {

struct Cells {
  double* base;
  std::int64_t padded;
  U4D_HD double& at(Field field, std::int64_t cell) const { return base[field * padded + cell]; }
};

U4D_HD Cells cells_of(const Problem& problem, std::int64_t frame) {
  return {problem.fields + frame * kFields * problem.padded, problem.padded};
}

U4D_HD bool is_plausible(const Camera& c) {
  const auto sane = [](double a, double g) U4D_INLINE_LAMBDA {
    return a > kMinHalfFovTan && a < kMaxHalfFovTan && std::fabs(g) < kMaxCentreOffset * a;
  };
  return sane(c.ax, c.gx) && sane(c.ay, c.gy);
}

// Weight of Geman and McClure for a squared error.
U4D_HD double robust_weight(double square, double inverse_width2) {
  const double spread = 1.0 + square * inverse_width2;
  return 1.0 / (spread * spread);
}

// Sums of w r and w / r give the noise level, and with it the width of the robust weights.
U4D_HD double inverse_width2_of(const double* sums, bool robust) {
  if (!robust) return 0.0;
  const double level2 = sums[0] / sums[1];
  return 1.0 / (kRobustWidth * kRobustWidth * (std::isfinite(level2) ? level2 : 1.0));
}

U4D_HD double larger(double a, double b) { return a > b ? a : b; }

U4D_HD void level_terms(double weight, double error, double floor, double* t) {
  const double r = larger(error, floor);
  t[0] = weight * r;
  t[1] = weight / r;
}

// Unit direction in the camera of the cell at (x, y); returns 1 / length before it was made a unit.
U4D_HD double unit_ray(const Camera& c, double x, double y, double& fx, double& fy, double& fz) {
  const double rx = c.ax * x + c.b * y - c.gx, ry = c.ay * y - c.gy;
  const double inverse = 1.0 / std::sqrt(rx * rx + ry * ry + 1.0);
  fx = rx * inverse, fy = ry * inverse, fz = inverse;
  return inverse;
}

U4D_HD double square_distance(double ax, double ay, double az, double bx, double by, double bz) {
  const double x = ax - bx, y = ay - by, z = az - bz;
  return x * x + y * y + z * z;
}

// Squared chord between the observed direction and the camera's.
U4D_HD double chord2(const Camera& c, const Cells& cells, std::int64_t i) {
  double fx, fy, fz;
  unit_ray(c, cells.at(kX, i), cells.at(kY, i), fx, fy, fz);
  const double dx = cells.at(kDx, i), dy = cells.at(kDy, i), dz = cells.at(kDz, i);
  const double qx = c.r[0] * dx + c.r[3] * dy + c.r[6] * dz, qy = c.r[1] * dx + c.r[4] * dy + c.r[7] * dz,
               qz = c.r[2] * dx + c.r[5] * dy + c.r[8] * dz;
  return square_distance(qx, qy, qz, fx, fy, fz);
}

// Reads a frame's rays, and decides whether they can determine a camera at all.
template <class Team>
U4D_HD void prepare(Team& team, const Problem& problem, std::int64_t frame, FrameState& state) {
  const Cells cells = cells_of(problem, frame);
  const std::int64_t count = problem.rows * problem.columns;
  const float* d = problem.directions + frame * 3 * count;
  const float* m = problem.moments + frame * 3 * count;
  const double half_side = larger(problem.image_height, problem.image_width) / 2;
  team.each(problem.padded, [=](std::int64_t i) {
    const bool there = i < count;
    const Field inputs[] = {kDx, kDy, kDz, kMx, kMy, kMz};
    for (int k = 0; k < 3; ++k) {
      cells.at(inputs[k], i) = there ? static_cast<double>(d[k * count + i]) : 0.0;
      cells.at(inputs[3 + k], i) = there ? static_cast<double>(m[k * count + i]) : 0.0;
    }
    const std::int64_t row = i / problem.columns, column = i - row * problem.columns;
    cells.at(kX, i) = there ? (kCell * (column + 0.5) - problem.image_width / 2) / half_side : 0.0;
    cells.at(kY, i) = there ? (kCell * (row + 0.5) - problem.image_height / 2) / half_side : 0.0;
    cells.at(kValid, i) = there ? 1.0 : 0.0;
    cells.at(kError, i) = 0.0;
    cells.at(kLength, i) = 1.0;
  });
  team.template sum<7>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
    const double x = cells.at(kDx, i), y = cells.at(kDy, i), z = cells.at(kDz, i);
    const double mx = cells.at(kMx, i), my = cells.at(kMy, i), mz = cells.at(kMz, i);
    const double length = std::sqrt(x * x + y * y + z * z);
    // A number minus itself is 0, except for inf and NaN.
    const double finite = (length - length) + (mx - mx) + (my - my) + (mz - mz);
    const bool usable = finite == 0.0 && length > 1e-6;
    const double valid = usable ? cells.at(kValid, i) : 0.0;
    const double dx = usable ? x / length : 0.0, dy = usable ? y / length : 0.0, dz = usable ? z / length : 0.0;
    cells.at(kDx, i) = dx, cells.at(kDy, i) = dy, cells.at(kDz, i) = dz;
    cells.at(kMx, i) = usable ? mx : 0.0, cells.at(kMy, i) = usable ? my : 0.0, cells.at(kMz, i) = usable ? mz : 0.0;
    cells.at(kValid, i) = valid, cells.at(kTrust, i) = valid;
    t[0] = valid;
    t[1] = dx * dx, t[2] = dx * dy, t[3] = dx * dz, t[4] = dy * dy, t[5] = dy * dz, t[6] = dz * dz;
  });
  team.once([&] {
    const double* s = state.sums;
    const double n = larger(s[0], 1.0);
    double scatter[3][3] = {
        {s[1] / n, s[2] / n, s[3] / n}, {s[2] / n, s[4] / n, s[5] / n}, {s[3] / n, s[5] / n, s[6] / n}};
    double vectors[3][3];
    small::jacobi(scatter, vectors);
    const double xx = scatter[0][0], yy = scatter[1][1], zz = scatter[2][2];
    const double least = -larger(-xx, larger(-yy, -zz));
    state.failed = s[0] < kMinCells || least < kMinSpread ? 1.0 : 0.0;
    state.inverse_width2 = 0.0;
    state.importance = kNoLevelYet;
  });
}

// Weights from a robust regression d ≈ A p, left in kTrust by way of kError and inverse_width2.
template <class Team>
U4D_HD void regression(Team& team, const Problem& problem, const Cells& cells, FrameState& state) {
  for (int round = 0; round < kRegressionRounds; ++round) {
    const double narrow = state.inverse_width2;
    team.template sum<15>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      const double error = cells.at(kError, i);
      const double w = cells.at(kValid, i) * robust_weight(error * error, narrow);
      cells.at(kTrust, i) = w;
      const double x = cells.at(kX, i), y = cells.at(kY, i);
      const double dx = cells.at(kDx, i), dy = cells.at(kDy, i), dz = cells.at(kDz, i);
      t[0] = w * x * x, t[1] = w * x * y, t[2] = w * x, t[3] = w * y * y, t[4] = w * y, t[5] = w;
      t[6] = w * x * dx, t[7] = w * x * dy, t[8] = w * x * dz;
      t[9] = w * y * dx, t[10] = w * y * dy, t[11] = w * y * dz;
      t[12] = w * dx, t[13] = w * dy, t[14] = w * dz;
    });
    team.once([&] {
      const double* s = state.sums;
      double a[3][3] = {{s[0], s[1], s[2]}, {s[1], s[3], s[4]}, {s[2], s[4], s[5]}};
      double b[3][3] = {{s[6], s[7], s[8]}, {s[9], s[10], s[11]}, {s[12], s[13], s[14]}};
      small::solve(a, b);
      for (int k = 0; k < 3; ++k) {
        for (int i = 0; i < 3; ++i) state.matrix[3 * k + i] = b[i][k];
      }
    });
    double a[9];
    for (int k = 0; k < 9; ++k) a[k] = state.matrix[k];
    team.template sum<2>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      const double x = cells.at(kX, i), y = cells.at(kY, i);
      const double error =
          std::sqrt(square_distance(cells.at(kDx, i), cells.at(kDy, i), cells.at(kDz, i), a[0] * x + a[1] * y + a[2],
                                    a[3] * x + a[4] * y + a[5], a[6] * x + a[7] * y + a[8]));
      cells.at(kError, i) = error;
      level_terms(cells.at(kTrust, i), error, kRegressionFloor, t);
    });
    team.once([&] { state.inverse_width2 = inverse_width2_of(state.sums, true); });
  }
}

// From the 45 sums: the matrix A with d ∝ +A p.
U4D_HD void solve_linear_fit(const double* s, double (&matrix)[9]) {
  const int symmetric[3][3] = {{0, 1, 2}, {1, 3, 4}, {2, 4, 5}};
  double normal[9][9], vectors[9][9];
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < 3; ++i) {
      for (int l = 0; l < 3; ++l) {
        for (int j = 0; j < 3; ++j) normal[3 * k + i][3 * l + j] = s[6 * symmetric[k][l] + symmetric[i][j]];
      }
    }
  }
  small::jacobi(normal, vectors);
  int least = 0;
  for (int i = 1; i < 9; ++i) {
    if (normal[i][i] < normal[least][least]) least = i;
  }
  double agreement = 0.0;
  for (int i = 0; i < 9; ++i) agreement += vectors[i][least] * s[36 + i];
  for (int i = 0; i < 9; ++i) matrix[i] = agreement < 0 ? -vectors[i][least] : vectors[i][least];
}

template <class Team>
U4D_HD void linear_fit(Team& team, const Problem& problem, const Cells& cells, FrameState& state) {
  for (int round = 0; round < kLinearRounds; ++round) {
    const double narrow = state.inverse_width2;
    team.template sum<45>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      const double error = cells.at(kError, i), length = cells.at(kLength, i);
      const double trust = cells.at(kValid, i) * robust_weight(error * error, narrow);
      cells.at(kTrust, i) = trust;
      const double w = trust / (length * length);
      const double x = cells.at(kX, i), y = cells.at(kY, i);
      const double dx = cells.at(kDx, i), dy = cells.at(kDy, i), dz = cells.at(kDz, i);
      const double xx = w * x * x, xy = w * x * y, wx = w * x, yy = w * y * y, wy = w * y;
      const double a0 = 1 - dx * dx, a1 = -dx * dy, a2 = -dx * dz, a3 = 1 - dy * dy, a4 = -dy * dz, a5 = 1 - dz * dz;
      t[0] = a0 * xx, t[1] = a0 * xy, t[2] = a0 * wx, t[3] = a0 * yy, t[4] = a0 * wy, t[5] = a0 * w;
      t[6] = a1 * xx, t[7] = a1 * xy, t[8] = a1 * wx, t[9] = a1 * yy, t[10] = a1 * wy, t[11] = a1 * w;
      t[12] = a2 * xx, t[13] = a2 * xy, t[14] = a2 * wx, t[15] = a2 * yy, t[16] = a2 * wy, t[17] = a2 * w;
      t[18] = a3 * xx, t[19] = a3 * xy, t[20] = a3 * wx, t[21] = a3 * yy, t[22] = a3 * wy, t[23] = a3 * w;
      t[24] = a4 * xx, t[25] = a4 * xy, t[26] = a4 * wx, t[27] = a4 * yy, t[28] = a4 * wy, t[29] = a4 * w;
      t[30] = a5 * xx, t[31] = a5 * xy, t[32] = a5 * wx, t[33] = a5 * yy, t[34] = a5 * wy, t[35] = a5 * w;
      t[36] = dx * wx, t[37] = dx * wy, t[38] = dx * w;
      t[39] = dy * wx, t[40] = dy * wy, t[41] = dy * w;
      t[42] = dz * wx, t[43] = dz * wy, t[44] = dz * w;
    });
    team.once([&] { solve_linear_fit(state.sums, state.matrix); });
    double a[9];
    for (int k = 0; k < 9; ++k) a[k] = state.matrix[k];
    team.template sum<2>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      const double x = cells.at(kX, i), y = cells.at(kY, i);
      const double px = a[0] * x + a[1] * y + a[2], py = a[3] * x + a[4] * y + a[5], pz = a[6] * x + a[7] * y + a[8];
      const double length = larger(std::sqrt(px * px + py * py + pz * pz), 1e-9);
      const double error = std::sqrt(
          square_distance(cells.at(kDx, i), cells.at(kDy, i), cells.at(kDz, i), px / length, py / length, pz / length));
      cells.at(kError, i) = error, cells.at(kLength, i) = length;
      level_terms(cells.at(kTrust, i), error, kErrorFloor, t);
    });
    team.once([&] { state.inverse_width2 = inverse_width2_of(state.sums, problem.robust); });
  }
}

// The best rotation for the intrinsics in state.fit.
template <class Team>
U4D_HD void fit_rotation(Team& team, const Problem& problem, const Cells& cells, FrameState& state) {
  team.once([&] { state.inverse_width2 = 0.0; });
  for (int round = 0; round < kLinearRounds; ++round) {
    const double narrow = state.inverse_width2;
    const Camera camera = state.fit;
    team.template sum<9>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      const double error = round == 0 ? 0.0 : cells.at(kError, i);
      const double w = cells.at(kValid, i) * robust_weight(error * error, narrow);
      double fx, fy, fz;
      unit_ray(camera, cells.at(kX, i), cells.at(kY, i), fx, fy, fz);
      const double dx = w * cells.at(kDx, i), dy = w * cells.at(kDy, i), dz = w * cells.at(kDz, i);
      t[0] = dx * fx, t[1] = dx * fy, t[2] = dx * fz;
      t[3] = dy * fx, t[4] = dy * fy, t[5] = dy * fz;
      t[6] = dz * fx, t[7] = dz * fy, t[8] = dz * fz;
    });
    team.once([&] { small::best_rotation(state.sums, state.fit.r); });
    const Camera turned = state.fit;
    team.template sum<2>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      const double error = std::sqrt(chord2(turned, cells, i));
      cells.at(kError, i) = error;
      level_terms(cells.at(kValid, i), error, kErrorFloor, t);
    });
    team.once([&] { state.inverse_width2 = inverse_width2_of(state.sums, problem.robust); });
  }
}

U4D_HD void set_inverse_k(Camera& c, double ax, double gx, double ay, double gy, double b) {
  c.ax = ax, c.gx = gx, c.ay = ay, c.gy = gy, c.b = b;
}

U4D_HD void set_known(const Problem& problem, const float* k, Camera& c) {
  const double half_side = larger(problem.image_height, problem.image_width) / 2;
  const double fx = k[0], skew = k[1], cx = k[2], fy = k[4], cy = k[5];
  const double ay = half_side / fy, gy = (cy - problem.image_height / 2) / fy;
  set_inverse_k(c, half_side / fx, (cx - problem.image_width / 2 - skew * gy) / fx, ay, gy, -skew * ay / fx);
}

// Everything up to a first camera of the frame by itself.
template <class Team>
U4D_HD void start_frame(Team& team, const Problem& problem, std::int64_t frame) {
  FrameState& state = problem.states[frame];
  const Cells cells = cells_of(problem, frame);
  prepare(team, problem, frame, state);
  if (problem.known_intrinsics != nullptr) {
    team.once([&] { set_known(problem, problem.known_intrinsics + 9 * frame, state.fit); });
    fit_rotation(team, problem, cells, state);
    return;
  }
  if (problem.robust) regression(team, problem, cells, state);
  linear_fit(team, problem, cells, state);
  team.once([&] {
    double upper[9];
    const double det = small::split(state.matrix, state.fit.r, upper);
    const double last = upper[8];
    set_inverse_k(state.fit, upper[0] / last, -upper[2] / last, upper[4] / last, -upper[5] / last, 0.0);
    state.sums[0] = det > 0 && is_plausible(state.fit) ? 1.0 : 0.0;
  });
  if (state.sums[0] == 0.0) {
    team.once([&] { set_inverse_k(state.fit, kFallbackHalfFovTan, 0.0, kFallbackHalfFovTan, 0.0, 0.0); });
    fit_rotation(team, problem, cells, state);
  }
  if (problem.square) {
    team.once([&] { state.fit.ax = state.fit.ay = std::sqrt(state.fit.ax * state.fit.ay); });
  }
}

// Terms of the normal equations. With q the observed direction in the camera and f the fitted one, the error is
// Exp(-turn) q - f; p and r are how f follows a change of the ray's x and y.
U4D_HD void refine_terms(const Camera& c, const Cells& cells, double narrow, std::int64_t i, double* t) {
  const double x = cells.at(kX, i), y = cells.at(kY, i);
  const double dx = cells.at(kDx, i), dy = cells.at(kDy, i), dz = cells.at(kDz, i), valid = cells.at(kValid, i);
  double fx, fy, fz;
  const double inverse = unit_ray(c, x, y, fx, fy, fz);
  const double qx = c.r[0] * dx + c.r[3] * dy + c.r[6] * dz, qy = c.r[1] * dx + c.r[4] * dy + c.r[7] * dz,
               qz = c.r[2] * dx + c.r[5] * dy + c.r[8] * dz;
  const double ex = qx - fx, ey = qy - fy, ez = qz - fz;
  const double square = ex * ex + ey * ey + ez * ez;
  const double spread = 1.0 + square * narrow;
  const double w = valid / (spread * spread);
  t[kCost] = valid * square / spread;

  const double px = inverse * (1 - fx * fx), py = -inverse * fx * fy, pz = -inverse * fx * fz;
  const double rx = py, ry = inverse * (1 - fy * fy), rz = -inverse * fy * fz;
  t[0] = w * (1 - qx * qx), t[1] = -w * qx * qy, t[2] = -w * qx * qz;
  t[3] = w * (1 - qy * qy), t[4] = -w * qy * qz, t[5] = w * (1 - qz * qz);

  const double ux = w * (qy * pz - qz * py), uy = w * (qz * px - qx * pz), uz = w * (qx * py - qy * px);
  const double vx = w * (qy * rz - qz * ry), vy = w * (qz * rx - qx * rz), vz = w * (qx * ry - qy * rx);
  t[6] = x * ux, t[7] = -ux, t[8] = y * vx, t[9] = -vx;
  t[10] = x * uy, t[11] = -uy, t[12] = y * vy, t[13] = -vy;
  t[14] = x * uz, t[15] = -uz, t[16] = y * vz, t[17] = -vz;

  const double pp = w * (px * px + py * py + pz * pz), pr = w * (px * rx + py * ry + pz * rz),
               rr = w * (rx * rx + ry * ry + rz * rz);
  t[18] = x * x * pp, t[19] = -x * pp, t[20] = x * y * pr, t[21] = -x * pr;
  t[22] = pp, t[23] = -y * pr, t[24] = pr;
  t[25] = y * y * rr, t[26] = -y * rr, t[27] = rr;

  t[28] = w * (fy * qz - fz * qy), t[29] = w * (fz * qx - fx * qz), t[30] = w * (fx * qy - fy * qx);
  const double pe = w * (px * ex + py * ey + pz * ez), re = w * (rx * ex + ry * ey + rz * ez);
  t[31] = x * pe, t[32] = -pe, t[33] = y * re, t[34] = -re;
}

// The noise level under the fit, and the normal equations there: the start of a stage of refinement.
template <class Team>
U4D_HD void begin_stage(Team& team, const Problem& problem, std::int64_t frame) {
  FrameState& state = problem.states[frame];
  const Cells cells = cells_of(problem, frame);
  const Camera camera = state.fit;
  // In the first stage all cells count for the level, afterwards those that the stage before trusted.
  const double before = state.importance == kNoLevelYet ? 0.0 : state.inverse_width2;
  team.template sum<2>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
    const double square = chord2(camera, cells, i);
    level_terms(cells.at(kValid, i) * robust_weight(square, before), std::sqrt(square), kErrorFloor, t);
  });
  team.once([&] {
    state.inverse_width2 = inverse_width2_of(state.sums, problem.robust);
    state.importance = state.failed != 0.0 ? 0.0 : (problem.robust ? state.inverse_width2 : 1.0);
    state.damping = kDampingStart;
    state.converged = 0.0;
  });
  const double narrow = state.inverse_width2;
  team.template sum<kNormals>(problem.padded, state.normal, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
    refine_terms(camera, cells, narrow, i, t);
  });
}

template <class Team>
U4D_HD void evaluate_candidate(Team& team, const Problem& problem, std::int64_t frame) {
  FrameState& state = problem.states[frame];
  if (problem.states[frame / problem.group * problem.group].converged != 0.0) return;
  const Cells cells = cells_of(problem, frame);
  const Camera camera = state.candidate;
  const double narrow = state.inverse_width2;
  team.template sum<kNormals>(problem.padded, state.candidate_normal, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
    refine_terms(camera, cells, narrow, i, t);
  });
}

// Robust least squares for o in m = o x q, with q the fitted camera's directions in the world.
template <class Team>
U4D_HD void fit_centre(Team& team, const Problem& problem, const Cells& cells, FrameState& state) {
  const Camera c = state.fit;
  const auto world = [=](std::int64_t i, double& x, double& y, double& z) U4D_INLINE_LAMBDA {
    double fx, fy, fz;
    unit_ray(c, cells.at(kX, i), cells.at(kY, i), fx, fy, fz);
    x = c.r[0] * fx + c.r[1] * fy + c.r[2] * fz;
    y = c.r[3] * fx + c.r[4] * fy + c.r[5] * fz;
    z = c.r[6] * fx + c.r[7] * fy + c.r[8] * fz;
  };
  team.template sum<2>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
    const double mx = cells.at(kMx, i), my = cells.at(kMy, i), mz = cells.at(kMz, i);
    t[0] = cells.at(kValid, i);
    t[1] = mx * mx + my * my + mz * mz;
    cells.at(kError, i) = 0.0;
  });
  const double floor = kErrorFloor * std::sqrt(state.sums[1] / larger(state.sums[0], 1.0)) + 1e-30;
  double narrow = 0.0;
  for (int round = 0; round < kCentreRounds; ++round) {
    team.template sum<9>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      const double error = cells.at(kError, i);
      const double w = cells.at(kValid, i) * robust_weight(error * error, narrow);
      cells.at(kTrust, i) = w;
      double x, y, z;
      world(i, x, y, z);
      const double mx = cells.at(kMx, i), my = cells.at(kMy, i), mz = cells.at(kMz, i);
      t[0] = w * (1 - x * x), t[1] = -w * x * y, t[2] = -w * x * z, t[3] = w * (1 - y * y), t[4] = -w * y * z;
      t[5] = w * (1 - z * z);
      t[6] = w * (y * mz - z * my), t[7] = w * (z * mx - x * mz), t[8] = w * (x * my - y * mx);
    });
    team.once([&] {
      const double* s = state.sums;
      double a[3][3] = {{s[0], s[1], s[2]}, {s[1], s[3], s[4]}, {s[2], s[4], s[5]}};
      double b[3][1] = {{s[6]}, {s[7]}, {s[8]}};
      small::solve(a, b);
      for (int k = 0; k < 3; ++k) state.centre[k] = b[k][0];
    });
    if (!problem.robust) return;
    const double ox = state.centre[0], oy = state.centre[1], oz = state.centre[2];
    team.template sum<2>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      double x, y, z;
      world(i, x, y, z);
      const double error = std::sqrt(square_distance(cells.at(kMx, i), cells.at(kMy, i), cells.at(kMz, i),
                                                     oy * z - oz * y, oz * x - ox * z, ox * y - oy * x));
      cells.at(kError, i) = error;
      level_terms(cells.at(kTrust, i), error, floor, t);
    });
    narrow = inverse_width2_of(state.sums, true);
  }
}

// Centre and residual, and the results written out. A failed frame's intrinsics were put in place before.
template <class Team>
U4D_HD void finish_frame(Team& team, const Problem& problem, std::int64_t frame) {
  FrameState& state = problem.states[frame];
  const Cells cells = cells_of(problem, frame);
  if (state.failed == 0.0) {
    fit_centre(team, problem, cells, state);
    const Camera camera = state.fit;
    team.template sum<2>(problem.padded, state.sums, [=](std::int64_t i, double* t) U4D_INLINE_LAMBDA {
      const double half = std::sqrt(chord2(camera, cells, i)) / 2;
      const double angle = 2 * std::asin(half < 1.0 ? half : 1.0);
      t[0] = cells.at(kValid, i);
      t[1] = cells.at(kValid, i) * angle * angle;
    });
  }
  team.once([&] {
    const bool failed = state.failed != 0.0;
    float* k = problem.intrinsics + 9 * frame;
    if (problem.known_intrinsics != nullptr) {
      for (int i = 0; i < 9; ++i) k[i] = problem.known_intrinsics[9 * frame + i];
    } else {
      const Camera& c = state.fit;
      const double half_side = larger(problem.image_height, problem.image_width) / 2;
      const double fx = half_side / c.ax, fy = half_side / c.ay;
      k[0] = static_cast<float>(fx), k[1] = 0.0f, k[2] = static_cast<float>(problem.image_width / 2 + c.gx * fx);
      k[3] = 0.0f, k[4] = static_cast<float>(fy), k[5] = static_cast<float>(problem.image_height / 2 + c.gy * fy);
      k[6] = 0.0f, k[7] = 0.0f, k[8] = 1.0f;
    }
    float* pose = problem.cam_to_world + 16 * frame;
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j)
        pose[4 * i + j] = failed ? (i == j ? 1.0f : 0.0f) : static_cast<float>(state.fit.r[3 * i + j]);
      pose[4 * i + 3] = failed ? 0.0f : static_cast<float>(state.centre[i]);
      pose[12 + i] = 0.0f;
    }
    pose[15] = 1.0f;
    problem.residual[frame] = failed ? INFINITY : static_cast<float>(std::sqrt(state.sums[1] / state.sums[0]));
  });
}

}  // namespace u4d::rays_to_cameras_detail
