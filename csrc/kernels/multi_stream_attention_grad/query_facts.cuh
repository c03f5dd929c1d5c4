// What the gradient needs to know of each query of each head, before the large kernels start.
#pragma once

#include "kernels/common/half_types.h"
#include "kernels/multi_stream_attention/tile_rows.cuh"

namespace u4d {

constexpr float kLog2e = 1.44269504088896340736f;

struct QueryFacts {
  float lse;    // of the scores, times log2(e)
  float delta;  // the sum over channels of grad * out
};

constexpr int kFactThreads = 256;

// As many neighbouring threads work on a row as it has 16-byte pieces. Neighbouring rows are tokens of one head.
template <int kDim>
struct FactRows {
  static constexpr int kPiece = Vector<Bfloat16>::kSize;
  static constexpr int kRowThreads = kDim / kPiece;
  static constexpr int kRows = kFactThreads / kRowThreads;  // of a block
};

template <int kDim>
__global__ __launch_bounds__(kFactThreads) void query_facts_kernel(const uint16_t* grad, Strides strides,
                                                                   const uint16_t* out, const float* lse, int heads,
                                                                   int tokens, QueryFacts* facts) {
  using Rows = FactRows<kDim>;
  const int thread = static_cast<int>(threadIdx.x);
  const int piece = thread % Rows::kRowThreads * Rows::kPiece;
  const unsigned blocks_of_head = (static_cast<unsigned>(tokens) + Rows::kRows - 1) / Rows::kRows;
  const int64_t clip_and_head = blockIdx.x / blocks_of_head;
  const int64_t clip = clip_and_head / heads, head = clip_and_head % heads;
  const int wanted = static_cast<int>(blockIdx.x % blocks_of_head) * Rows::kRows + thread / Rows::kRowThreads;
  const int64_t token = wanted < tokens ? wanted : tokens - 1;  // all threads take part in the shuffles
  const auto* grad_row =
      reinterpret_cast<const Bfloat16*>(grad) + clip * strides.clip + token * strides.token + head * strides.head;
  const auto* out_row = reinterpret_cast<const Bfloat16*>(out) + ((clip * tokens + token) * heads + head) * kDim;
  const Vector<Bfloat16> a = load_vector(grad_row + piece), b = load_vector(out_row + piece);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Rows::kPiece; ++i) sum = fmaf(to_float(a.values[i]), to_float(b.values[i]), sum);
#pragma unroll
  for (int distance = Rows::kRowThreads / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  const int64_t query = clip_and_head * tokens + token;
  if (piece == 0 && wanted < tokens) facts[query] = {kLog2e * lse[query], sum};
}

}  // namespace u4d
