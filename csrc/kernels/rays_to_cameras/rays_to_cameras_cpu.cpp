#include "kernels/rays_to_cameras/rays_to_cameras.h"

#include <cstddef>
#include <utility>

#include "kernels/common/vectorise.h"
#include "kernels/rays_to_cameras/frame_fit.h"
#include "kernels/rays_to_cameras/group_fit.h"
#include "kernels/rays_to_cameras/problem.h"

namespace u4d {
namespace {

using namespace rays_to_cameras_detail;

// One thread works on a frame, kLanes cells at a time.
struct Vector {
  template <class F>
  U4D_INLINE void each(std::int64_t count, F f) const {
    for (std::int64_t i = 0; i < count; ++i) f(i);
  }

  template <int K, class F>
  U4D_INLINE void sum(std::int64_t count, double* out, F f) const {
    sum_terms(count, out, f, std::make_integer_sequence<int, K>());
  }

  template <class F>
  U4D_INLINE void once(F f) const {
    f();
  }

 private:
  // One partial sum per lane, whatever the width of the machine's vectors: the order of additions is always the same.
  template <class F, int... k>
  U4D_INLINE void sum_terms(std::int64_t count, double* out, F f, std::integer_sequence<int, k...>) const {
    constexpr int K = sizeof...(k);
    alignas(64) double partial[K][kLanes] = {};
    for (std::int64_t first = 0; first < count; first += kLanes) {
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) {
        double t[K];
        f(first + lane, t);
        ((partial[k][lane] += t[k]), ...);
      }
    }
    for (int i = 0; i < K; ++i) {
      double total = 0.0;
      for (int lane = 0; lane < kLanes; ++lane) total += partial[i][lane];
      out[i] = total;
    }
  }
};

struct OneLane {
  std::int64_t lane = 0, lanes = 1;
  U4D_INLINE double sum(double value) const { return value; }
  U4D_INLINE double largest(double value) const { return value; }
  U4D_INLINE void wait() const {}
};

U4D_CLONES void start(const Problem& problem, std::int64_t frame) {
  Vector team;
  start_frame(team, problem, frame);
}

U4D_CLONES void begin(const Problem& problem, std::int64_t frame) {
  Vector team;
  begin_stage(team, problem, frame);
}

U4D_CLONES void evaluate(const Problem& problem, std::int64_t frame) {
  Vector team;
  evaluate_candidate(team, problem, frame);
}

U4D_CLONES void finish(const Problem& problem, std::int64_t frame) {
  Vector team;
  finish_frame(team, problem, frame);
}

// Fits one group. Threads are used here if it is a clip, and by the caller if it is one frame.
void fit_group(const Problem& problem, std::int64_t group, int num_threads) {
  const std::int64_t from = group * problem.group, to = from + problem.group;
  const auto every_frame = [&](void (*step)(const Problem&, std::int64_t)) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (to - from > 1)
    for (std::int64_t frame = from; frame < to; ++frame) step(problem, frame);
  };
  const OneLane team;
  every_frame(start);
  if (problem.group > 1) share_intrinsics(team, problem, problem.states + from);
  for (int stage = 0; stage < kRefineStages; ++stage) {
    every_frame(begin);
    for (int round = 0; round <= kRefineRounds; ++round) {
      advance(team, problem, group, round);
      if (round < kRefineRounds && problem.states[from].converged == 0.0) every_frame(evaluate);
    }
  }
  settle(team, problem, group);
  every_frame(finish);
}

}  // namespace

std::int64_t rays_to_cameras_workspace(std::int64_t batch, std::int64_t frames, std::int64_t rows,
                                       std::int64_t columns) {
  const std::int64_t fields = kFields * padded_cells(rows, columns) * static_cast<std::int64_t>(sizeof(double));
  return batch * frames * (static_cast<std::int64_t>(sizeof(FrameState)) + fields);
}

Status rays_to_cameras_cpu(int num_threads, const float* directions, const float* moments,
                           const float* known_intrinsics, float* intrinsics, float* cam_to_world, float* residual,
                           void* workspace, std::int64_t batch, std::int64_t frames, std::int64_t rows,
                           std::int64_t columns, std::int64_t image_height, std::int64_t image_width,
                           std::int64_t options) {
  Problem problem;
  const Status status = lay_out(directions, moments, known_intrinsics, intrinsics, cam_to_world, residual, workspace,
                                batch, frames, rows, columns, image_height, image_width, options, problem);
  if (status != kOk || problem.all_frames == 0) return status;
  const std::int64_t groups = problem.all_frames / problem.group;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (problem.group == 1)
  for (std::int64_t group = 0; group < groups; ++group) fit_group(problem, group, num_threads);
  return kOk;
}

}  // namespace u4d
