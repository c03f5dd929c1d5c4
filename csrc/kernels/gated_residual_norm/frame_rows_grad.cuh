// One CUDA kernel for the backward passes of ada_layer_norm, gated_residual and both in one pass.
//
// A block takes some rows of one frame, one after the other: each of its threads owns columns, so that the sums over
// rows for the tables stay in registers and are written once, as one part of the frame's sums. All that a row needs is
// loaded before the first sum over the row, and its tables are read from the cache. A row with a norm takes three
// barriers; without one its threads do not wait for each other.
#pragma once

#include "kernels/common/launch.h"

#include "kernels/gated_residual_norm/frame_rows.cuh"
#include "kernels/gated_residual_norm/frame_rows_grad.h"

namespace u4d::frame_rows {

template <class T>
struct GradArguments {
  const T *grad_x_new, *update;  // with kGate only; with kNorm too, grad_x_new may be null for zeros
  const T *grad_normed, *x_new;  // with kNorm only; x_new is what was normalised
  FrameTable gate, scale;
  T *grad_x, *grad_update;  // of x with kNorm, of update with kGate
  float* partials;          // [parts, tables, groups, width]: gate, shift, scale, as far as there are
  RowSizes sizes;
  FrameParts by;
  float eps;
};

struct PairOfSums {
  float first, second;
};

// Two sums over the block, each as sum_of_row makes it, for one barrier.
__device__ __forceinline__ PairOfSums sums_of_row(float first, float second, int warps, float* slots,
                                                  float* more_slots) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    first += __shfl_xor_sync(0xffffffffu, first, lanes);
    second += __shfl_xor_sync(0xffffffffu, second, lanes);
  }
  if (warps == 1) return {first, second};
  if (threadIdx.x % kWarp == 0) {
    slots[threadIdx.x / kWarp] = first;
    more_slots[threadIdx.x / kWarp] = second;
  }
  __syncthreads();
  first = second = 0.0f;
  for (int k = 0; k < warps; ++k) {
    first += slots[k];
    second += more_slots[k];
  }
  return {first, second};
}

template <class T, int kChunks, bool kVectors, bool kGate, bool kNorm>
__global__ __launch_bounds__(kThreads, 1) void grad_kernel(const GradArguments<T> a) {
  // A sum's slots are written again one row later, after barriers that all its readers have passed.
  __shared__ float slots[4][kWarps];
  constexpr int kTables = (kGate ? 1 : 0) + (kNorm ? 2 : 0);
  // Registers are short in the widest rows: what the gate needs is loaded after the norm, chunk by chunk.
  constexpr bool kLate = kNorm && kChunks == kMostChunks;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int width = static_cast<int>(a.sizes.width);
  const int own = static_cast<int>(threadIdx.x) * kChunk, step = static_cast<int>(blockDim.x) * kChunk;
  const std::int64_t group = blockIdx.x / a.by.parts, part = blockIdx.x % a.by.parts;
  const std::int64_t first = part * a.by.rows_per_part, last = min(first + a.by.rows_per_part, a.sizes.patches);
  const FramePlace place = place_of(group * a.sizes.patches, a.sizes);
  const float columns = static_cast<float>(width);
  const int grad_width = kNorm && a.grad_x_new == nullptr ? 0 : width;

  Chunk sums[kTables][kChunks];
#pragma unroll
  for (int table = 0; table < kTables; ++table) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sums[table][c].values[i] = 0.0f;
    }
  }
  for (std::int64_t patch = first; patch < last; ++patch) {
    const std::int64_t at = (group * a.sizes.patches + patch) * a.sizes.width;
    Chunk x[kChunks], slope[kChunks];      // of the norm
    Chunk grad[kChunks], update[kChunks];  // the gradient of x
    float inverse = 0.0f, slope_mean = 0.0f, along = 0.0f;
    const auto load_gated = [&](int c) {
      grad[c] = load_chunk<kVectors>(a.grad_x_new + at, own + c * step, grad_width);
      update[c] = load_chunk<kVectors>(a.update + at, own + c * step, width);
    };
    const auto store = [&](int c) {
      if constexpr (kGate) store_chunk<kVectors>(a.grad_update + at, own + c * step, width, update[c]);
      if constexpr (kNorm) store_chunk<kVectors>(a.grad_x + at, own + c * step, width, grad[c]);
    };
    if constexpr (kGate && !kLate) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) load_gated(c);
    }
    if constexpr (kNorm) {
      float sum = 0.0f, squares = 0.0f, slope_sum = 0.0f, along_sum = 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        x[c] = load_chunk<kVectors>(a.x_new + at, own + c * step, width);
        slope[c] = load_chunk<kVectors>(a.grad_normed + at, own + c * step, width);
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sum += x[c].values[i];
      }
      const float mean = sum_of_row(sum, warps, slots[0]) / columns;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          x[c].values[i] = is_column<kVectors>(own + c * step, i, width) ? x[c].values[i] - mean : 0.0f;
          squares += x[c].values[i] * x[c].values[i];
        }
      }
      inverse = 1.0f / sqrtf(sum_of_row(squares, warps, slots[1]) / columns + a.eps);
      const float* scale_row = row_of(a.scale, place);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const Chunk scale = load_chunk<kVectors>(scale_row, own + c * step, width);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float normed = x[c].values[i] * inverse, out = slope[c].values[i];
          sums[kTables - 2][c].values[i] += out;
          sums[kTables - 1][c].values[i] += out * normed;
          x[c].values[i] = normed;
          slope[c].values[i] = out * (1.0f + scale.values[i]);
          slope_sum += slope[c].values[i];
          along_sum += slope[c].values[i] * normed;
        }
      }
      const PairOfSums both = sums_of_row(slope_sum, along_sum, warps, slots[2], slots[3]);
      slope_mean = both.first / columns;
      along = both.second / columns;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if constexpr (kGate && kLate) load_gated(c);
      if constexpr (kNorm) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float through_norm = (slope[c].values[i] - slope_mean - x[c].values[i] * along) * inverse;
          grad[c].values[i] = kGate ? grad[c].values[i] + through_norm : through_norm;
        }
      }
      if constexpr (kGate) {
        const Chunk gate = load_chunk<kVectors>(row_of(a.gate, place), own + c * step, width);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          sums[0][c].values[i] += grad[c].values[i] * update[c].values[i];
          update[c].values[i] = grad[c].values[i] * gate.values[i];
        }
      }
      if constexpr (kLate) store(c);
    }
    // A loop of its own: the compiler moves no load across a store, since the two may meet in memory.
    if constexpr (!kLate) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) store(c);
    }
  }
  float* to = a.partials + (part * kTables * a.by.groups + group) * a.sizes.width;
#pragma unroll
  for (int table = 0; table < kTables; ++table) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      store_chunk<kVectors>(to + table * a.by.groups * a.sizes.width, own + c * step, width, sums[table][c]);
    }
  }
}

template <int kChunks, bool kVectors, bool kGate, bool kNorm, class T>
Status launch_grad_chunks(void* stream, const GradArguments<T>& a, int threads) {
  if (a.by.tasks() > INT32_MAX) return kTooLarge;
  U4D_LAUNCH((grad_kernel<T, kChunks, kVectors, kGate, kNorm>), static_cast<unsigned int>(a.by.tasks()), threads, 0,
             stream, a);
  return launch_status();
}

// Pointers and tables that an op does not have are null with strides 0, which take vectors.
template <class T>
bool grad_takes_vectors(const GradArguments<T>& a) {
  if (a.sizes.width % kChunk != 0) return false;
  const T* const pointers[] = {a.grad_x_new, a.update, a.grad_normed, a.x_new, a.grad_x, a.grad_update};
  for (const T* pointer : pointers) {
    if (!takes_vectors(pointer, a.sizes.width)) return false;
  }
  return takes_vectors(a.partials, a.sizes.width) && table_takes_vectors(a.gate) && table_takes_vectors(a.scale);
}

template <bool kGate, bool kNorm, class T>
Status launch_rows_grad(void* stream, GradArguments<T> a, std::int64_t rows_per_part) {
  const Status status = check_parts(a.sizes, rows_per_part);
  if (status != kOk) return status;
  if (a.sizes.rows() == 0) return kOk;
  a.by = parts_of(a.sizes, rows_per_part);
  const std::int64_t chunks = (a.sizes.width + kChunk - 1) / kChunk;
  const int threads = static_cast<int>(chunks < kThreads ? (chunks + kWarp - 1) / kWarp * kWarp : kThreads);
  if (!grad_takes_vectors(a)) return launch_grad_chunks<kMostChunks, false, kGate, kNorm>(stream, a, threads);
  if (chunks <= threads) return launch_grad_chunks<1, true, kGate, kNorm>(stream, a, threads);
  if (chunks <= 2 * threads) return launch_grad_chunks<2, true, kGate, kNorm>(stream, a, threads);
  return launch_grad_chunks<kMostChunks, true, kGate, kNorm>(stream, a, threads);
}

}  // namespace u4d::frame_rows
