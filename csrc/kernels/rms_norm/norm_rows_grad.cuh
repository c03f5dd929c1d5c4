// The CUDA kernel of the gradients of rms_norm and of qk_norm_rope: activations and gradient are read once.
//
// A block has a chunk of one stream's rows and works on them by teams of threads, as the forward kernel does. A thread
// comes to the same channels in every row, so it adds up their weight gradients in registers. At the end a block writes
// one row of sums; the rows of all chunks are added in a fixed order afterwards, so the result is the same each time.
#pragma once

#include "kernels/rms_norm/norm_rows.cuh"

namespace u4d::norm_rows {

struct GradRows {
  std::int64_t stream_stride, batch_stride, token_stride, tokens, rows;  // rows of one stream
  int streams, batch, width;
  int head_dim;  // 0: the gradient has the order of x and is not turned
  float eps;
};

struct RowSums {
  float squares, products;  // of x; of x, the gradient and the weight
};

// Both sums over a team at once. `parity` alternates from row to row, so that one barrier per row is enough.
template <int kThreads>
__device__ __forceinline__ RowSums team_sums(float first, float second, int parity) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    first += __shfl_xor_sync(0xffffffffu, first, lanes);
    second += __shfl_xor_sync(0xffffffffu, second, lanes);
  }
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ float partial[2][2][kWarps];
    if (threadIdx.x % kWarp == 0) {
      partial[parity][0][threadIdx.x / kWarp] = first;
      partial[parity][1][threadIdx.x / kWarp] = second;
    }
    __syncthreads();
    first = second = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      first += partial[parity][0][warp];
      second += partial[parity][1][warp];
    }
  }
  return {first, second};
}

// Turns kSize neighbouring gradients back by the angles that the forward pass turned by.
template <int kSize>
__device__ __forceinline__ void turn_back(const float* cos, const float* sin, float (&grad)[kSize]) {
  float cosines[kSize / 2], sines[kSize / 2];
  load_angles(cos, cosines);
  load_angles(sin, sines);
#pragma unroll
  for (int p = 0; p < kSize / 2; ++p) {
    const float even = grad[2 * p], odd = grad[2 * p + 1];
    grad[2 * p] = even * cosines[p] + odd * sines[p];
    grad[2 * p + 1] = odd * cosines[p] - even * sines[p];
  }
}

template <class T, bool kTurn, int kTeam, int kThreads, int kHeld>
__global__ void __launch_bounds__(kThreads, 256 / kThreads)
    norm_grad_kernel(const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ weight,
                     const float* __restrict__ cos, const float* __restrict__ sin, T* __restrict__ grad_x,
                     float* __restrict__ partial, GradRows rows) {
  constexpr int kSize = Vector<T>::kSize, kTeams = kThreads / kTeam;
  const int thread = threadIdx.x % kTeam, team = threadIdx.x / kTeam, stream = static_cast<int>(blockIdx.y);
  const int vectors = rows.width / kSize;
  const float* weights = weight + static_cast<std::int64_t>(stream) * rows.width;
  const std::int64_t chunk = blockIdx.x, first = chunk_begin(rows.rows, chunk, gridDim.x);
  const std::int64_t last = chunk_begin(rows.rows, chunk + 1, gridDim.x);

  float sums[kHeld][kSize];
#pragma unroll
  for (int v = 0; v < kHeld; ++v) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[v][i] = 0.0f;
  }
  int parity = 0;
  for (std::int64_t row = first + team; row < last; row += kTeams, parity ^= 1) {
    const std::int64_t batch = row / rows.tokens, token = row - batch * rows.tokens;
    const T* from = x + stream * rows.stream_stride + batch * rows.batch_stride + token * rows.token_stride;
    const std::int64_t in_order = stream * rows.rows + row;
    const T* grads = grad + (kTurn ? (batch * rows.streams + stream) * rows.tokens + token : in_order) * rows.width;
    Vector<T> held[kHeld];
    float turned[kHeld][kSize];
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      const int index = thread + v * kTeam;
      if (index < vectors) held[v] = load_vector(from + index * kSize);
    }
    float squares = 0.0f, products = 0.0f;
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      const int index = thread + v * kTeam;
      if (index >= vectors) break;
      load_floats(grads + index * kSize, turned[v]);
      if constexpr (kTurn) {
        const std::int64_t angle = token * (rows.head_dim / 2) + index * kSize % rows.head_dim / 2;
        turn_back(cos + angle, sin + angle, turned[v]);
      }
      float weighted[kSize];
      load_floats(weights + index * kSize, weighted);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float value = to_float(held[v].values[i]);
        squares += value * value;
        products += value * turned[v][i] * weighted[i];
      }
    }
    const RowSums both = team_sums<kTeam>(squares, products, parity);
    const float width = static_cast<float>(rows.width), inverse = rsqrtf(both.squares / width + rows.eps);
    const float back = both.products * inverse * inverse / width;
    T* to = grad_x + in_order * rows.width;
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      const int index = thread + v * kTeam;
      if (index >= vectors) break;
      float weighted[kSize];
      load_floats(weights + index * kSize, weighted);
      Vector<T> result;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float value = to_float(held[v].values[i]);
        sums[v][i] += turned[v][i] * (value * inverse);
        round_to((weighted[i] * turned[v][i] - value * back) * inverse, result.values[i]);
      }
      store_vector(to + index * kSize, result);
    }
  }

  float* to = partial + (chunk * rows.streams + stream) * rows.width;
  if constexpr (kTeams == 1) {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (thread + v * kTeam < vectors) to[(thread + v * kTeam) * kSize + i] = sums[v][i];
      }
    }
  } else {
    __shared__ float of_team[kTeams][kHeld * kTeam * kSize];
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) of_team[team][(thread + v * kTeam) * kSize + i] = sums[v][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows.width; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int other = 0; other < kTeams; ++other) sum += of_team[other][i];
      to[i] = sum;
    }
  }
}

template <class T, bool kTurn>
Status launch_rows_grad(void* stream, const T* grad, const T* x, const float* weight, const float* cos,
                        const float* sin, T* grad_x, float* partial, const Sizes& sizes, std::int64_t head_dim,
                        std::int64_t chunks, double eps) {
  constexpr int kSize = Vector<T>::kSize, kNarrowHeld = 6, kWideHeld = 4;
  if (chunks < 1 || chunks > 65535) return kInvalidArgument;
  if (sizes.rows() == 0 || sizes.width == 0) return kInvalidArgument;  // `partial` would stay unwritten
  const std::int64_t vectors = sizes.width / kSize;
  if (!takes_vectors(x, sizes.stream_stride) || !takes_vectors(x, sizes.batch_stride) ||
      !takes_vectors(x, sizes.token_stride) || !takes_vectors(grad, sizes.width) ||
      !takes_vectors(grad_x, sizes.width) || !takes_vectors(weight, sizes.width) ||
      vectors > kWideThreads * kWideHeld ||
      (kTurn && (head_dim % kSize != 0 || !takes_vectors(cos, 0) || !takes_vectors(sin, 0)))) {
    return kInvalidArgument;
  }
  if (sizes.streams > 65535) return kTooLarge;
  const GradRows rows{sizes.stream_stride,
                      sizes.batch_stride,
                      sizes.token_stride,
                      sizes.tokens,
                      sizes.batch * sizes.tokens,
                      static_cast<int>(sizes.streams),
                      static_cast<int>(sizes.batch),
                      static_cast<int>(sizes.width),
                      static_cast<int>(head_dim),
                      static_cast<float>(eps)};
  const dim3 grid(static_cast<unsigned int>(chunks), static_cast<unsigned int>(sizes.streams));
  if (vectors <= kWarp * kNarrowHeld) {
    U4D_LAUNCH((norm_grad_kernel<T, kTurn, kWarp, kNarrowThreads, kNarrowHeld>), grid, kNarrowThreads, 0, stream, grad,
               x, weight, cos, sin, grad_x, partial, rows);
  } else {
    U4D_LAUNCH((norm_grad_kernel<T, kTurn, kWideThreads, kWideThreads, kWideHeld>), grid, kWideThreads, 0, stream, grad,
               x, weight, cos, sin, grad_x, partial, rows);
  }
  return launch_status();
}

}  // namespace u4d::norm_rows
