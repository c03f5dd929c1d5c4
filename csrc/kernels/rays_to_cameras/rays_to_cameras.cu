#include "kernels/rays_to_cameras/rays_to_cameras.h"

#include "kernels/common/launch.h"
#include "kernels/rays_to_cameras/frame_fit.h"
#include "kernels/rays_to_cameras/group_fit.h"
#include "kernels/rays_to_cameras/problem.h"

namespace u4d {
namespace {

using namespace rays_to_cameras_detail;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// A block works on a frame. Sums are added in an order that depends on nothing but the number of cells.
struct Block {
  template <class F>
  __device__ __forceinline__ void each(std::int64_t count, F f) const {
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) f(i);
  }

  template <int K, class F>
  __device__ __forceinline__ void sum(std::int64_t count, double* out, F f) const {
    __shared__ double of_warp[kWarps][K];
    double total[K];
#pragma unroll
    for (int k = 0; k < K; ++k) total[k] = 0.0;
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
      double t[K];
      f(i, t);
#pragma unroll
      for (int k = 0; k < K; ++k) total[k] += t[k];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) total[k] += __shfl_xor_sync(0xffffffffu, total[k], lanes);
      if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][k] = total[k];
    }
    __syncthreads();
    if (threadIdx.x < K) {
      double all = 0.0;
      for (int warp = 0; warp < kWarps; ++warp) all += of_warp[warp][threadIdx.x];
      out[threadIdx.x] = all;
    }
    __syncthreads();
  }

  template <class F>
  __device__ __forceinline__ void once(F f) const {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
};

struct Warp {
  std::int64_t lane, lanes;
  __device__ __forceinline__ double sum(double value) const {
    for (int other = kWarp / 2; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
    return value;
  }
  __device__ __forceinline__ double largest(double value) const {
    for (int other = kWarp / 2; other > 0; other /= 2)
      value = larger(value, __shfl_xor_sync(0xffffffffu, value, other));
    return value;
  }
  __device__ __forceinline__ void wait() const { __syncwarp(); }
};

__global__ void __launch_bounds__(kThreads, 1) start_kernel(Problem problem) {
  Block team;
  start_frame(team, problem, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads, 1) begin_kernel(Problem problem) {
  Block team;
  begin_stage(team, problem, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads, 1) evaluate_kernel(Problem problem) {
  Block team;
  evaluate_candidate(team, problem, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads, 1) finish_kernel(Problem problem) {
  Block team;
  finish_frame(team, problem, blockIdx.x);
}

__global__ void __launch_bounds__(kWarp) share_kernel(Problem problem) {
  const Warp team{threadIdx.x, kWarp};
  share_intrinsics(team, problem, problem.states + blockIdx.x * problem.group);
}

__global__ void __launch_bounds__(kWarp) advance_kernel(Problem problem, int round) {
  const Warp team{threadIdx.x, kWarp};
  advance(team, problem, blockIdx.x, round);
}

__global__ void __launch_bounds__(kWarp) settle_kernel(Problem problem) {
  const Warp team{threadIdx.x, kWarp};
  settle(team, problem, blockIdx.x);
}

}  // namespace

// A handful of small launches instead of one kernel: a clip's frames must meet between the steps when they share
// intrinsics.
Status rays_to_cameras_cuda(void* stream, const float* directions, const float* moments, const float* known_intrinsics,
                            float* intrinsics, float* cam_to_world, float* residual, void* workspace,
                            std::int64_t batch, std::int64_t frames, std::int64_t rows, std::int64_t columns,
                            std::int64_t image_height, std::int64_t image_width, std::int64_t options) {
  Problem problem;
  const Status status = lay_out(directions, moments, known_intrinsics, intrinsics, cam_to_world, residual, workspace,
                                batch, frames, rows, columns, image_height, image_width, options, problem);
  if (status != kOk || problem.all_frames == 0) return status;
  if (problem.all_frames > 0x7fffffff) return kTooLarge;
  const unsigned int all = static_cast<unsigned int>(problem.all_frames);
  const unsigned int groups = static_cast<unsigned int>(problem.all_frames / problem.group);
  U4D_LAUNCH(start_kernel, all, kThreads, 0, stream, problem);
  if (problem.group > 1) U4D_LAUNCH(share_kernel, groups, kWarp, 0, stream, problem);
  for (int stage = 0; stage < kRefineStages; ++stage) {
    U4D_LAUNCH(begin_kernel, all, kThreads, 0, stream, problem);
    for (int round = 0; round <= kRefineRounds; ++round) {
      U4D_LAUNCH(advance_kernel, groups, kWarp, 0, stream, problem, round);
      if (round < kRefineRounds) U4D_LAUNCH(evaluate_kernel, all, kThreads, 0, stream, problem);
    }
  }
  U4D_LAUNCH(settle_kernel, groups, kWarp, 0, stream, problem);
  U4D_LAUNCH(finish_kernel, all, kThreads, 0, stream, problem);
  return launch_status();
}

}  // namespace u4d
