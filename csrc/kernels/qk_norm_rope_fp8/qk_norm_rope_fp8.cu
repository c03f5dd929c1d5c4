// qk_norm_rope's kernel (kernels/rms_norm/norm_rows.cuh) with e4m3 at its end: the lanes that hold a head find its
// largest magnitude by shuffles, so its scale costs no barrier.
#include "kernels/qk_norm_rope_fp8/qk_norm_rope_fp8.h"

#include "kernels/rms_norm/norm_rows.cuh"

namespace u4d {
namespace {

using namespace norm_rows;

template <class T>
struct alignas(Vector<T>::kSize) HeldCodes {
  E4m3 values[Vector<T>::kSize];
};

// The largest over groups of `lanes` lanes, a power of two. Full warps come here.
__device__ __forceinline__ std::uint32_t largest_of_lanes(std::uint32_t mine, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    mine = max(mine, __shfl_xor_sync(0xffffffffu, mine, distance));
  }
  return mine;
}

// A head lies in 2^head_shift neighbouring lanes, at most a warp.
template <class T, class W, int kTeam, int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    held_heads_kernel(const T* __restrict__ x, const W* __restrict__ weight, const float* __restrict__ cos,
                      const float* __restrict__ sin, E4m3* __restrict__ values, float* __restrict__ scale, Rows rows,
                      int head_shift) {
  constexpr int kSize = Vector<T>::kSize, kPairs = kSize / 2;
  const int thread = threadIdx.x % kTeam, lane = threadIdx.x % kWarp;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (token >= rows.tokens) return;  // a whole team
  const Place place = place_of(rows, token);
  const int vectors = rows.width / kSize;
  Vector<T> held[kHeldVectors];
  load_held<kTeam>(x + place.in, thread, vectors, held);
  const float inverse = inverse_of_held<kTeam>(held, thread, vectors, rows);

  const W* weights = weight + static_cast<std::int64_t>(place.stream) * rows.width;
  float* scales = scale + ((place.out / kSize) >> head_shift);
  // As in held_rows_kernel: angles are read once where head_dim divides the step.
  const int step = kTeam * kSize % rows.head_dim;
  int channel = thread * kSize % rows.head_dim;
  float cosines[kPairs], sines[kPairs];
#pragma unroll
  for (int v = 0; v < kHeldVectors; ++v) {
    const int index = thread + v * kTeam;
    if (index - lane >= vectors) break;  // a whole warp, since the others exchange what they hold
    float turned[kSize] = {};
    if (index < vectors) {
      load_floats(weights + index * kSize, turned);
#pragma unroll
      for (int i = 0; i < kSize; ++i) turned[i] *= to_float(held[v].values[i]) * inverse;
      if (v == 0 || step != 0) {
        const std::int64_t angle = place.token * (rows.head_dim / 2) + channel / 2;
        load_angles(cos + angle, cosines);
        load_angles(sin + angle, sines);
        channel += step;
        if (channel >= rows.head_dim) channel -= rows.head_dim;
      }
      turn(turned, cosines, sines);
    }
    std::uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) largest = max(largest, magnitude_bits(turned[i]));
    const float head_scale = scale_of_row(largest_of_lanes(largest, 1 << head_shift)), factor = 1.0f / head_scale;
    if (index < vectors) {
      HeldCodes<T> codes;
#pragma unroll
      for (int i = 0; i < kSize; ++i) round_to(turned[i] * factor, codes.values[i]);
      *reinterpret_cast<HeldCodes<T>*>(values + place.out + index * kSize) = codes;
      if (lane % (1 << head_shift) == 0) scales[index >> head_shift] = head_scale;
    }
  }
}

// Any width, any head and any alignment: a block per row, a warp per head, and everything is computed anew when it is
// needed again.
template <class T, class W>
__global__ void __launch_bounds__(kWideThreads)
    plain_heads_kernel(const T* __restrict__ x, const W* __restrict__ weight, const float* __restrict__ cos,
                       const float* __restrict__ sin, E4m3* __restrict__ values, float* __restrict__ scale, Rows rows) {
  const Place place = place_of(rows, blockIdx.x);
  const T* row = x + place.in;
  const W* weights = weight + static_cast<std::int64_t>(place.stream) * rows.width;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < rows.width; i += kWideThreads) {
    const float value = to_float(row[i]);
    sum += value * value;
  }
  const float inverse = rsqrtf(team_sum<kWideThreads>(sum) / static_cast<float>(rows.width) + rows.eps);
  const int lane = threadIdx.x % kWarp, pairs = rows.head_dim / 2, heads = rows.width / rows.head_dim;
  const float *cosines = cos + place.token * pairs, *sines = sin + place.token * pairs;
  for (int head = threadIdx.x / kWarp; head < heads; head += kWideThreads / kWarp) {
    const auto turned = [&](int pair, float (&to)[2]) {
      const int first = head * rows.head_dim + 2 * pair;
      const float angle[2][1] = {{cosines[pair]}, {sines[pair]}};
      to[0] = to_float(row[first]) * inverse * to_float(weights[first]);
      to[1] = to_float(row[first + 1]) * inverse * to_float(weights[first + 1]);
      turn(to, angle[0], angle[1]);
    };
    float channels[2];
    std::uint32_t largest = 0;
    for (int pair = lane; pair < pairs; pair += kWarp) {
      turned(pair, channels);
      largest = max(largest, max(magnitude_bits(channels[0]), magnitude_bits(channels[1])));
    }
    const float head_scale = scale_of_row(largest_of_lanes(largest, kWarp)), factor = 1.0f / head_scale;
    E4m3* to = values + place.out + static_cast<std::int64_t>(head) * rows.head_dim;
    for (int pair = lane; pair < pairs; pair += kWarp) {
      turned(pair, channels);
      round_to(channels[0] * factor, to[2 * pair]);
      round_to(channels[1] * factor, to[2 * pair + 1]);
    }
    if (lane == 0) scale[place.out / rows.head_dim + head] = head_scale;
  }
}

// log2 of the lanes that hold a head; -1 where they are no power of two, or more than a warp.
int head_shift_of(std::int64_t head_dim, int vector) {
  for (int shift = 0; shift <= 5; ++shift) {
    if (head_dim == std::int64_t{vector} << shift) return shift;
  }
  return -1;
}

template <class T, class W>
Status launch(void* stream, const T* x, const W* weight, const float* cos, const float* sin, E4m3* values, float* scale,
              const Sizes& sizes, std::int64_t head_dim, double eps) {
  constexpr int kSize = Vector<T>::kSize;
  if (sizes.rows() == 0) return kOk;
  if (!fits_grid(sizes)) return kTooLarge;
  const Rows rows = rows_of(sizes, head_dim, eps);
  const auto grid = [&](int rows_per_block) {
    return dim3(blocks_for(sizes.tokens, rows_per_block), static_cast<unsigned int>(sizes.streams * sizes.batch));
  };
  const int head_shift = head_shift_of(head_dim, kSize);
  const bool whole_vectors = head_shift >= 0 && rows_take_vectors(x, sizes) && takes_vectors(weight, sizes.width) &&
                             takes_vectors(cos, 0) && takes_vectors(sin, 0) && takes_vectors(values, 0);
  const std::int64_t vectors = sizes.width / kSize;
  if (whole_vectors && vectors <= kWarp * kHeldVectors) {
    U4D_LAUNCH((held_heads_kernel<T, W, kWarp, kNarrowThreads>), grid(kNarrowThreads / kWarp), kNarrowThreads, 0,
               stream, x, weight, cos, sin, values, scale, rows, head_shift);
  } else if (whole_vectors && vectors <= kWideThreads * kHeldVectors) {
    U4D_LAUNCH((held_heads_kernel<T, W, kWideThreads, kWideThreads>), grid(1), kWideThreads, 0, stream, x, weight, cos,
               sin, values, scale, rows, head_shift);
  } else {
    U4D_LAUNCH((plain_heads_kernel<T, W>), grid(1), kWideThreads, 0, stream, x, weight, cos, sin, values, scale, rows);
  }
  return launch_status();
}

}  // namespace

Status qk_norm_rope_fp8_cuda(void* stream, const void* x, const void* weight, const float* cos, const float* sin,
                             E4m3* values, float* scale, std::int64_t dtype, std::int64_t weight_dtype,
                             std::int64_t streams, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                             std::int64_t head_dim, std::int64_t stream_stride, std::int64_t batch_stride,
                             std::int64_t token_stride, double eps) {
  const Sizes sizes{streams, batch, tokens, heads * head_dim, stream_stride, batch_stride, token_stride};
  if (!sizes.valid() || heads < 1 || head_dim < 2 || head_dim % 2 != 0) return kInvalidArgument;
  return with_types(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    return launch(stream, static_cast<const T*>(x), static_cast<const W*>(weight), cos, sin, values, scale, sizes,
                  head_dim, eps);
  });
}

}  // namespace u4d
