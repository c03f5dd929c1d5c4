// A row of channels is read once, held in registers by a team of 4 to 32 threads, summed up, normed, activated and
// written. Wan's VAE has 96, 192 and 384 channels: with three 16-byte vectors for each thread, teams of 4 to 32 (of
// which several share a warp) leave no thread idle. Rows that are not whole vectors, or wider, take a plain kernel.
#include "kernels/causal_norm_silu/causal_norm_silu.h"

#include "kernels/causal_norm_silu/channel_rows.h"
#include "kernels/common/launch.h"

namespace u4d {
namespace {

using namespace channel_rows;

constexpr int kThreads = 256;
constexpr int kHeldVectors = 3;       // per thread
constexpr int kSmallestTeamBits = 2;  // a team has 4 to 32 threads

// The sum over `team` neighbouring threads of a warp, the same bits in each; all threads of the warp call it.
__device__ __forceinline__ float team_sum(float value, int team) {
  for (int lanes = team / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

__device__ __forceinline__ float activated(float scaled) { return __fdividef(scaled, 1.0f + expf(-scaled)); }

// As many neighbours of a table as a vector of T has.
template <class T, class W>
__device__ __forceinline__ void load_floats(const W* from, float (&to)[Vector<T>::kSize]) {
#pragma unroll
  for (int first = 0; first < Vector<T>::kSize; first += Vector<W>::kSize) {
    const Vector<W> vector = load_vector(from + first);
#pragma unroll
    for (int i = 0; i < Vector<W>::kSize; ++i) to[first + i] = to_float(vector.values[i]);
  }
}

// Clips along the grid's y; a clip's rows, those in front among them, along x.
template <class T, class W>
__global__ void __launch_bounds__(kThreads, 3) held_rows_kernel(Arguments<T, W> given, int team_bits) {
  constexpr int kSize = Vector<T>::kSize;
  const int team = 1 << team_bits, lane = static_cast<int>(threadIdx.x) & (team - 1);
  const std::int64_t out_row = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> team_bits;
  const std::int64_t row = out_row - given.front, clip = blockIdx.y;
  const bool is_row = row >= 0 && row < given.rows;
  const std::int64_t from = (clip * given.rows + row) * given.width;

  Vector<T> held[kHeldVectors], added[kHeldVectors];  // all reads are on their way before the first is used
#pragma unroll
  for (int v = 0; v < kHeldVectors; ++v) {
    const int at = (lane + v * team) * kSize;
    if (!is_row || at >= given.width) continue;
    held[v] = load_vector(given.x + from + at);
    if (given.residual) added[v] = load_vector(given.residual + from + at);
  }
  float values[kHeldVectors][kSize], squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kHeldVectors; ++v) {
    const int at = (lane + v * team) * kSize;
    if (!is_row || at >= given.width) continue;
    float bias[kSize] = {};
    if (given.bias) load_floats<T>(given.bias + at, bias);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values[v][i] = to_float(held[v].values[i]) + bias[i];
      if (given.residual) values[v][i] = rounded(values[v][i] + to_float(added[v].values[i]), held[v].values[i]);
      squares += values[v][i] * values[v][i];
    }
    if (given.residual) store_vector(given.total + from + at, held[v]);
  }
  const float inverse = inverse_norm(team_sum(squares, team), given.width);

  if (row >= given.rows) return;
  T* to = given.normed + (clip * (given.front + given.rows) + out_row) * given.width;
  const T* before = given.before ? given.before + (clip * given.front + out_row) * given.width : nullptr;
#pragma unroll
  for (int v = 0; v < kHeldVectors; ++v) {
    const int at = (lane + v * team) * kSize;
    if (at >= given.width) continue;
    Vector<T> result = {};
    if (is_row) {
      float gamma[kSize];
      load_floats<T>(given.gamma + at, gamma);
#pragma unroll
      for (int i = 0; i < kSize; ++i) round_to(activated(values[v][i] * inverse * gamma[i]), result.values[i]);
    } else if (before) {
      result = load_vector(before + at);
    }
    store_vector(to + at, result);
  }
}

// Any width and any alignment: a warp per row, which it reads twice.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) plain_rows_kernel(Arguments<T, W> given) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t out_row = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const std::int64_t row = out_row - given.front, clip = blockIdx.y;
  if (row >= given.rows) return;  // a whole warp
  T* to = given.normed + (clip * (given.front + given.rows) + out_row) * given.width;
  if (row < 0) {
    const T* before = given.before ? given.before + (clip * given.front + out_row) * given.width : nullptr;
    for (int i = lane; i < given.width; i += kWarp) to[i] = before ? before[i] : T{};
    return;
  }
  const std::int64_t from = (clip * given.rows + row) * given.width;
  float squares = 0.0f;
  for (int i = lane; i < given.width; i += kWarp) {
    float value = to_float(given.x[from + i]) + (given.bias ? to_float(given.bias[i]) : 0.0f);
    if (given.residual) value = rounded(value + to_float(given.residual[from + i]), given.total[from + i]);
    squares += value * value;
  }
  const float inverse = inverse_norm(team_sum(squares, kWarp), given.width);
  for (int i = lane; i < given.width; i += kWarp) {  // each thread reads of `total` what it wrote itself
    const float value = given.residual ? to_float(given.total[from + i])
                                       : to_float(given.x[from + i]) + (given.bias ? to_float(given.bias[i]) : 0.0f);
    round_to(activated(value * inverse * to_float(given.gamma[i])), to[i]);
  }
}

template <class T, class W>
Status launch(void* stream, const Arguments<T, W>& given) {
  if (given.empty()) return kOk;
  if (given.batch > 65535 || given.front + given.rows > 2147483647) return kTooLarge;  // CUDA's limits of a grid
  const auto grid = [&](int rows_per_block) {
    return dim3(blocks_for(given.front + given.rows, rows_per_block), static_cast<unsigned int>(given.batch));
  };
  const std::int64_t width = given.width;
  const bool whole = takes_vectors(given.x, width) && takes_vectors(given.residual, width) &&
                     takes_vectors(given.before, width) && takes_vectors(given.gamma, width) &&
                     takes_vectors(given.bias, width) && takes_vectors(given.total, width) &&
                     takes_vectors(given.normed, width);
  const int vectors = given.width / Vector<T>::kSize;
  if (whole && vectors <= kWarp * kHeldVectors) {
    int team_bits = kSmallestTeamBits;
    while ((kHeldVectors << team_bits) < vectors) ++team_bits;
    U4D_LAUNCH((held_rows_kernel<T, W>), grid(kThreads >> team_bits), kThreads, 0, stream, given, team_bits);
  } else {
    U4D_LAUNCH((plain_rows_kernel<T, W>), grid(kThreads / kWarp), kThreads, 0, stream, given);
  }
  return launch_status();
}

}  // namespace

Status causal_norm_silu_cuda(void* stream, const void* x, const void* residual, const void* before, const void* gamma,
                             const void* bias, void* total, void* normed, std::int64_t dtype, std::int64_t weight_dtype,
                             std::int64_t batch, std::int64_t rows, std::int64_t front, std::int64_t width) {
  return with_arguments(x, residual, before, gamma, bias, total, normed, dtype, weight_dtype, batch, rows, front, width,
                        [&](const auto& given) { return launch(stream, given); });
}

}  // namespace u4d
