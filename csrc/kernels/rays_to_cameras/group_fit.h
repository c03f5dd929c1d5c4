// The steps of the fit between the passes over cells: they join the frames of a group, which share their intrinsics
// (one frame by itself, or a clip). Shared intrinsics are eliminated last: the rotation of each frame is solved for in
// terms of them (Schur complement), so a group of any size costs one 4x4 system. A Team offers lane, lanes, sum(value)
// over the lanes in a fixed order, and wait(), after which all see what any lane has written.
#pragma once

#include <cmath>

#include "kernels/common/host_device.h"
#include "kernels/rays_to_cameras/frame_fit.h"

namespace u4d::rays_to_cameras_detail {

U4D_HD double& intrinsic(Camera& c, int which) {
  return which == 0 ? c.ax : which == 1 ? c.gx : which == 2 ? c.ay : c.gy;
}

// Every frame of a clip starts from the (lower) median of the intrinsics of the frames that have any.
template <class Team>
U4D_HD void share_intrinsics(const Team& team, const Problem& problem, FrameState* states) {
  const std::int64_t frames = problem.group;
  double good_here = 0.0;
  for (std::int64_t i = team.lane; i < frames; i += team.lanes) good_here += states[i].failed == 0.0 ? 1.0 : 0.0;
  const double good = team.sum(good_here);
  const double middle = std::floor((good - 1) / 2);
  double* median = states[0].matrix;  // not needed any more
  for (int which = 0; which < 4; ++which) {
    if (good == 0.0 && team.lane == 0) median[which] = which % 2 == 0 ? kFallbackHalfFovTan : 0.0;
    for (std::int64_t i = team.lane; i < frames; i += team.lanes) {
      if (states[i].failed != 0.0) continue;
      const double value = intrinsic(states[i].fit, which);
      double rank = 0.0;
      for (std::int64_t j = 0; j < frames; ++j) {
        const double other = intrinsic(states[j].fit, which);
        if (states[j].failed == 0.0 && (other < value || (other == value && j < i))) rank += 1.0;
      }
      if (rank == middle) median[which] = value;
    }
  }
  team.wait();
  for (std::int64_t i = team.lane; i < frames; i += team.lanes) {
    for (int which = 0; which < 4; ++which) intrinsic(states[i].fit, which) = median[which];
  }
  team.wait();
}

U4D_HD double damped(double diagonal, double damping) { return diagonal == 0.0 ? 1.0 : diagonal * (1.0 + damping); }

// Joins the columns of ax and ay where pixels are square: row `c` of a block with four columns.
U4D_HD void join_columns(const Problem& problem, double* row) {
  if (!problem.square) return;
  row[0] += row[2];
  row[2] = 0.0;
}

// Solves one frame's rotation for [gradient | coupling to the intrinsics]: by[k][0] and by[k][1..4].
U4D_HD void eliminate_rotation(const Problem& problem, const FrameState& s, double damping, double (&coupling)[3][4],
                               double (&by)[3][5]) {
  const double w = s.importance;
  const double* n = s.normal;
  double rr[3][3] = {{damped(w * n[0], damping), w * n[1], w * n[2]},
                     {w * n[1], damped(w * n[3], damping), w * n[4]},
                     {w * n[2], w * n[4], damped(w * n[5], damping)}};
  for (int k = 0; k < 3; ++k) {
    for (int j = 0; j < 4; ++j) coupling[k][j] = w * n[kTurnRay + 4 * k + j];
    join_columns(problem, coupling[k]);
    by[k][0] = w * n[kTurnDown + k];
    for (int j = 0; j < 4; ++j) by[k][1 + j] = coupling[k][j];
  }
  small::solve(rr, by);
}

// Marquardt's step from the normal equations of the fit: writes every frame's candidate.
template <class Team>
U4D_HD void propose(const Team& team, const Problem& problem, FrameState* states) {
  const double damping = states[0].damping;
  const bool known = problem.known_intrinsics != nullptr;
  double squares[4][4] = {}, taken[4][4] = {}, target[4][1] = {};
  double coupling[3][4], by[3][5];
  for (std::int64_t i = team.lane; i < problem.group && !known; i += team.lanes) {
    const FrameState& s = states[i];
    eliminate_rotation(problem, s, damping, coupling, by);
    const double* n = s.normal + kRaySquares;
    double kk[4][4] = {
        {n[0], n[1], n[2], n[3]}, {n[1], n[4], n[5], n[6]}, {n[2], n[5], n[7], n[8]}, {n[3], n[6], n[8], n[9]}};
    double down[4] = {s.normal[kRayDown], s.normal[kRayDown + 1], s.normal[kRayDown + 2], s.normal[kRayDown + 3]};
    for (int a = 0; a < 4; ++a) join_columns(problem, kk[a]);
    if (problem.square) {
      for (int b = 0; b < 4; ++b) kk[0][b] += kk[2][b], kk[2][b] = 0.0;
    }
    join_columns(problem, down);
    for (int a = 0; a < 4; ++a) {
      target[a][0] += s.importance * down[a];
      for (int k = 0; k < 3; ++k) target[a][0] -= coupling[k][a] * by[k][0];
      for (int b = 0; b < 4; ++b) {
        squares[a][b] += s.importance * kk[a][b];
        for (int k = 0; k < 3; ++k) taken[a][b] += coupling[k][a] * by[k][1 + b];
      }
    }
  }
  if (!known) {
    for (int a = 0; a < 4; ++a) {
      target[a][0] = team.sum(target[a][0]);
      for (int b = 0; b < 4; ++b) {
        const double square = team.sum(squares[a][b]);
        squares[a][b] = (a == b ? damped(square, damping) : square) - team.sum(taken[a][b]);
      }
    }
    small::solve(squares, target);
    if (problem.square) target[2][0] = target[0][0];
  }
  for (std::int64_t i = team.lane; i < problem.group; i += team.lanes) {
    FrameState& s = states[i];
    eliminate_rotation(problem, s, damping, coupling, by);
    double turn[3], rotation[9];
    for (int k = 0; k < 3; ++k) {
      turn[k] = by[k][0];
      const int columns = problem.square ? 2 : 3;  // ax and ay moved as one, in column 0
      for (int j = 0; j < 4 && !known; ++j) {
        if (columns == 3 || j != 2) turn[k] -= by[k][1 + j] * target[j][0];
      }
    }
    small::rotation_of_quaternion(1.0, turn[0] / 2, turn[1] / 2, turn[2] / 2, rotation);
    s.candidate = s.fit;
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) {
        s.candidate.r[3 * a + b] =
            s.fit.r[3 * a] * rotation[b] + s.fit.r[3 * a + 1] * rotation[3 + b] + s.fit.r[3 * a + 2] * rotation[6 + b];
      }
    }
    for (int j = 0; j < 4 && !known; ++j) intrinsic(s.candidate, j) += target[j][0];
  }
}

// Takes the candidates over if they lower the group's cost, and sets the damping for the next step.
template <class Team>
U4D_HD void decide(const Team& team, const Problem& problem, FrameState* states) {
  double cost[2] = {0.0, 0.0}, absurd = 0.0;
  for (std::int64_t i = team.lane; i < problem.group; i += team.lanes) {
    const FrameState& s = states[i];
    cost[0] += s.importance * s.normal[kCost];
    cost[1] += s.importance * s.candidate_normal[kCost];
    if (problem.known_intrinsics == nullptr && s.failed == 0.0 && !is_plausible(s.candidate)) absurd += 1.0;
  }
  const double old_cost = team.sum(cost[0]), new_cost = team.sum(cost[1]);
  const bool better = new_cost < old_cost && team.sum(absurd) == 0.0;
  for (std::int64_t i = team.lane; i < problem.group && better; i += team.lanes) {
    states[i].fit = states[i].candidate;
    for (int k = 0; k < kNormals; ++k) states[i].normal[k] = states[i].candidate_normal[k];
  }
  if (team.lane == 0) {
    const double damping = better ? states[0].damping / 10 : states[0].damping * 10;
    states[0].damping = damping < kDampingMin ? kDampingMin : damping > kDampingMax ? kDampingMax : damping;
    if (std::fabs(old_cost - new_cost) <= kConverged * old_cost) states[0].converged = 1.0;
  }
  team.wait();
}

// One turn of refinement: judge the step that was evaluated (not in the first round), and propose the next (not in the
// last).
template <class Team>
U4D_HD void advance(const Team& team, const Problem& problem, std::int64_t group, int round) {
  FrameState* states = problem.states + group * problem.group;
  if (states[0].converged != 0.0) return;
  if (round > 0) decide(team, problem, states);
  if (round < kRefineRounds && states[0].converged == 0.0) propose(team, problem, states);
}

// Marks frames without a believable camera, and gives them intrinsics: those of their clip where it has any.
template <class Team>
U4D_HD void settle(const Team& team, const Problem& problem, std::int64_t group) {
  if (problem.known_intrinsics != nullptr) return;
  FrameState* states = problem.states + group * problem.group;
  double first_good_here = 0.0;  // 1 + index counted from the end, so that the largest is the first frame
  for (std::int64_t i = team.lane; i < problem.group; i += team.lanes) {
    if (!is_plausible(states[i].fit)) states[i].failed = 1.0;
    if (states[i].failed == 0.0) first_good_here = larger(first_good_here, static_cast<double>(problem.group - i));
  }
  const double first_good = team.largest(first_good_here);
  team.wait();
  for (std::int64_t i = team.lane; i < problem.group; i += team.lanes) {
    if (states[i].failed == 0.0) continue;
    set_inverse_k(states[i].fit, kFallbackHalfFovTan, 0.0, kFallbackHalfFovTan, 0.0, 0.0);
    if (first_good > 0.0) {
      const Camera& good = states[problem.group - static_cast<std::int64_t>(first_good)].fit;
      set_inverse_k(states[i].fit, good.ax, good.gx, good.ay, good.gy, 0.0);
    }
  }
}

}  // namespace u4d::rays_to_cameras_detail
