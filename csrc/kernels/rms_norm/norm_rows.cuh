// The CUDA kernel of rms_norm and of qk_norm_rope: a row of activations is read once, held in registers, normed, turned
// if wanted, and written.
//
// A team of threads has a row: one warp for narrow rows (no barrier at all), a block of eight for wide ones. Rows that
// do not consist of whole 16-byte vectors, or are too wide to be held, take a plain kernel.
#pragma once

#include "kernels/common/launch.h"
#include "kernels/rms_norm/norm_rows.h"

namespace u4d::norm_rows {

constexpr int kHeldVectors = 8;  // per thread: 32 registers
constexpr int kNarrowThreads = 128, kWideThreads = 256;

// Arguments of the kernels besides the arrays. Rows of one (stream, batch) pair lie along the grid's x, pairs along y.
struct Rows {
  std::int64_t stream_stride, batch_stride, token_stride, tokens;
  int streams, batch, width;
  int head_dim;  // 0: channels are not turned, and the output keeps the order of the input
  float eps;
};

// Where the row that this thread works on is.
struct Place {
  int stream;
  std::int64_t token, in, out;
};

__device__ __forceinline__ Place place_of(const Rows& rows, std::int64_t token) {
  const int pair = static_cast<int>(blockIdx.y), stream = pair / rows.batch, batch = pair - stream * rows.batch;
  const int out_pair = rows.head_dim ? batch * rows.streams + stream : pair;
  return {stream, token, stream * rows.stream_stride + batch * rows.batch_stride + token * rows.token_stride,
          (out_pair * rows.tokens + token) * rows.width};
}

// The sum over a team, the same bits in every thread of it; the whole block calls it where a team is a block.
template <int kThreads>
__device__ __forceinline__ float team_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  if constexpr (kThreads > kWarp) {
    __shared__ float partial[kThreads / kWarp];
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarp; ++warp) value += partial[warp];
  }
  return value;
}

// kCount neighbouring weights from an address that is a multiple of 16 bytes.
template <int kCount, class W>
__device__ __forceinline__ void load_floats(const W* from, float (&to)[kCount]) {
#pragma unroll
  for (int first = 0; first < kCount; first += Vector<W>::kSize) {
    const Vector<W> vector = load_vector(from + first);
#pragma unroll
    for (int i = 0; i < Vector<W>::kSize; ++i) to[first + i] = to_float(vector.values[i]);
  }
}

// Cosine and sine of kPairs neighbouring pairs; a multiple of kPairs * 4 bytes.
template <int kPairs>
__device__ __forceinline__ void load_angles(const float* from, float (&to)[kPairs]) {
  struct alignas(4 * kPairs) Angles {
    float values[kPairs];
  };
  const Angles angles = *reinterpret_cast<const Angles*>(from);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) to[i] = angles.values[i];
}

// This thread's vectors of a row: all reads are on their way before the first is used.
template <int kTeam, class T>
__device__ __forceinline__ void load_held(const T* row, int thread, int vectors, Vector<T> (&held)[kHeldVectors]) {
#pragma unroll
  for (int v = 0; v < kHeldVectors; ++v) {
    const int index = thread + v * kTeam;
    if (index < vectors) held[v] = load_vector(row + index * Vector<T>::kSize);
  }
}

// The inverse of a held row's root mean square.
template <int kTeam, class T>
__device__ __forceinline__ float inverse_of_held(const Vector<T> (&held)[kHeldVectors], int thread, int vectors,
                                                 const Rows& rows) {
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kHeldVectors; ++v) {
    if (thread + v * kTeam >= vectors) break;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      const float value = to_float(held[v].values[i]);
      sum += value * value;
    }
  }
  return rsqrtf(team_sum<kTeam>(sum) / static_cast<float>(rows.width) + rows.eps);
}

// Turns pairs of neighbours.
template <int kPairs>
__device__ __forceinline__ void turn(float (&values)[2 * kPairs], const float (&cosines)[kPairs],
                                     const float (&sines)[kPairs]) {
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const float even = values[2 * p], odd = values[2 * p + 1];
    values[2 * p] = even * cosines[p] - odd * sines[p];
    values[2 * p + 1] = even * sines[p] + odd * cosines[p];
  }
}

template <class T, class W, bool kTurn, int kTeam, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    held_rows_kernel(const T* __restrict__ x, const W* __restrict__ weight, const float* __restrict__ cos,
                     const float* __restrict__ sin, T* __restrict__ out, Rows rows) {
  constexpr int kSize = Vector<T>::kSize, kPairs = kSize / 2;
  const int thread = threadIdx.x % kTeam;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (token >= rows.tokens) return;  // a whole team
  const Place place = place_of(rows, token);
  const int vectors = rows.width / kSize;

  Vector<T> held[kHeldVectors];
  load_held<kTeam>(x + place.in, thread, vectors, held);
  const float inverse = inverse_of_held<kTeam>(held, thread, vectors, rows);

  const W* weights = weight + static_cast<std::int64_t>(place.stream) * rows.width;
  // In steps of kTeam vectors a thread comes to the same pairs of another head wherever head_dim divides the step: then
  // it reads its angles once.
  const int step = kTurn ? kTeam * kSize % rows.head_dim : 0;
  int channel = kTurn ? thread * kSize % rows.head_dim : 0;
  float cosines[kPairs], sines[kPairs];
#pragma unroll
  for (int v = 0; v < kHeldVectors; ++v) {
    const int index = thread + v * kTeam;
    if (index >= vectors) break;
    float weighted[kSize];
    load_floats(weights + index * kSize, weighted);
#pragma unroll
    for (int i = 0; i < kSize; ++i) weighted[i] *= to_float(held[v].values[i]) * inverse;
    if constexpr (kTurn) {
      if (v == 0 || step != 0) {
        const std::int64_t angle = place.token * (rows.head_dim / 2) + channel / 2;
        load_angles(cos + angle, cosines);
        load_angles(sin + angle, sines);
        channel += step;
        if (channel >= rows.head_dim) channel -= rows.head_dim;
      }
      turn(weighted, cosines, sines);
    }
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kSize; ++i) round_to(weighted[i], result.values[i]);
    store_vector(out + place.out + index * kSize, result);
  }
}

// Any width and any alignment: a block per row, which is read twice.
template <class T, class W, bool kTurn>
__global__ void __launch_bounds__(kWideThreads)
    plain_rows_kernel(const T* __restrict__ x, const W* __restrict__ weight, const float* __restrict__ cos,
                      const float* __restrict__ sin, T* __restrict__ out, Rows rows) {
  const Place place = place_of(rows, blockIdx.x);
  const T* row = x + place.in;
  const W* weights = weight + static_cast<std::int64_t>(place.stream) * rows.width;
  T* to = out + place.out;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < rows.width; i += kWideThreads) {
    const float value = to_float(row[i]);
    sum += value * value;
  }
  const float inverse = rsqrtf(team_sum<kWideThreads>(sum) / static_cast<float>(rows.width) + rows.eps);
  if constexpr (kTurn) {
    const int pairs = rows.head_dim / 2;
    for (int i = threadIdx.x; i < rows.width / 2; i += kWideThreads) {
      const float even = to_float(row[2 * i]) * inverse * to_float(weights[2 * i]);
      const float odd = to_float(row[2 * i + 1]) * inverse * to_float(weights[2 * i + 1]);
      const std::int64_t angle = place.token * pairs + i % pairs;
      round_to(even * cos[angle] - odd * sin[angle], to[2 * i]);
      round_to(even * sin[angle] + odd * cos[angle], to[2 * i + 1]);
    }
  } else {
    for (int i = threadIdx.x; i < rows.width; i += kWideThreads) {
      round_to(to_float(row[i]) * inverse * to_float(weights[i]), to[i]);
    }
  }
}

inline Rows rows_of(const Sizes& sizes, std::int64_t head_dim, double eps) {
  return {sizes.stream_stride,
          sizes.batch_stride,
          sizes.token_stride,
          sizes.tokens,
          static_cast<int>(sizes.streams),
          static_cast<int>(sizes.batch),
          static_cast<int>(sizes.width),
          static_cast<int>(head_dim),
          static_cast<float>(eps)};
}

// Whether all rows of x can be read by vectors.
template <class T>
bool rows_take_vectors(const T* x, const Sizes& sizes) {
  return takes_vectors(x, sizes.stream_stride) && takes_vectors(x, sizes.batch_stride) &&
         takes_vectors(x, sizes.token_stride);
}

// Within CUDA's limits of a grid, and of 32-bit arithmetic within a row.
inline bool fits_grid(const Sizes& sizes) {
  return sizes.streams * sizes.batch <= 65535 && sizes.tokens <= 2147483647 && sizes.width <= (1 << 30);
}

template <class T, class W, bool kTurn>
Status launch_rows(void* stream, const T* x, const W* weight, const float* cos, const float* sin, T* out,
                   const Sizes& sizes, std::int64_t head_dim, double eps) {
  constexpr int kSize = Vector<T>::kSize;
  const std::int64_t pairs = sizes.streams * sizes.batch;
  if (sizes.rows() == 0 || sizes.width == 0) return kOk;
  if (!fits_grid(sizes)) return kTooLarge;
  const Rows rows = rows_of(sizes, head_dim, eps);
  const auto grid = [&](int rows_per_block) {
    return dim3(blocks_for(sizes.tokens, rows_per_block), static_cast<unsigned int>(pairs));
  };
  const bool whole_vectors = rows_take_vectors(x, sizes) && takes_vectors(out, sizes.width) &&
                             takes_vectors(weight, sizes.width) &&
                             (!kTurn || (head_dim % kSize == 0 && takes_vectors(cos, 0) && takes_vectors(sin, 0)));
  const std::int64_t vectors = sizes.width / kSize;
  if (whole_vectors && vectors <= kWarp * kHeldVectors) {
    U4D_LAUNCH((held_rows_kernel<T, W, kTurn, kWarp, kNarrowThreads>), grid(kNarrowThreads / kWarp), kNarrowThreads, 0,
               stream, x, weight, cos, sin, out, rows);
  } else if (whole_vectors && vectors <= kWideThreads * kHeldVectors) {
    U4D_LAUNCH((held_rows_kernel<T, W, kTurn, kWideThreads, kWideThreads>), grid(1), kWideThreads, 0, stream, x, weight,
               cos, sin, out, rows);
  } else {
    U4D_LAUNCH((plain_rows_kernel<T, W, kTurn>), grid(1), kWideThreads, 0, stream, x, weight, cos, sin, out, rows);
  }
  return launch_status();
}

}  // namespace u4d::norm_rows
