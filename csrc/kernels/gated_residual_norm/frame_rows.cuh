// One CUDA kernel for ada_layer_norm, gated_residual and both in one pass: a row is read once, kept in the registers of
// one to eight warps and written once.
//
// A lane holds chunks of 8 neighbouring columns (16 bytes of a half type, 2 x 16 of float32), all loaded before the
// first is used. Mean and squared deviations are two sums over registers; one warp needs shuffles only. A table's row
// serves the P rows of its frame from the cache: neighbouring rows run on the same multiprocessor. The norm may be
// written as e4m3 with a scale per row, whose largest magnitude is one more reduction over the same registers.
#pragma once

#include <type_traits>

#include "kernels/common/launch.h"

#include "kernels/gated_residual_norm/frame_rows.h"
#include "kernels/gated_residual_norm/row_chunks.cuh"
#include "kernels/quantize_rows/quantize_chunks.cuh"

namespace u4d::frame_rows {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Blocks that at least fit on a multiprocessor, which bounds the registers that loads made ahead may take.
constexpr int blocks_of(bool vectors) { return vectors ? 2 : 1; }

static_assert(kMaxWidth == std::int64_t{kThreads} * kMostChunks * kChunk);

// Out is the type of the norm: T, or E4m3.
template <class T, class Out = T>
struct Arguments {
  const T *x, *update;  // update and gate: with kGate only
  FrameTable gate, shift, scale;
  T* x_new;
  Out* normed;
  float* norm_scale;  // [rows], of e4m3 only
  RowSizes sizes;
  std::int64_t rows;
  float eps;
  int warps_per_row;
};

template <class T, class Out, int kChunks, bool kVectors, bool kGate, bool kNorm>
__global__ __launch_bounds__(kThreads, blocks_of(kVectors)) void rows_kernel(const Arguments<T, Out> a) {
  __shared__ float slots[2][kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t given =
      static_cast<std::int64_t>(blockIdx.x) * (kWarps / a.warps_per_row) + warp / a.warps_per_row;
  // A row behind the last one is computed like the last, so that all threads meet the barriers, and not written.
  const std::int64_t row = given < a.rows ? given : a.rows - 1;
  const FramePlace place = place_of(row, a.sizes);
  const int width = static_cast<int>(a.sizes.width);
  const int write_width = given < a.rows ? width : 0;
  const int own = (warp % a.warps_per_row * kWarp + lane) * kChunk;
  const int step = a.warps_per_row * kWarp * kChunk;
  const std::int64_t at = row * a.sizes.width;

  Chunk chunks[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) chunks[c] = load_chunk<kVectors>(a.x + at, own + c * step, width);
  if constexpr (kGate) {
    const float* gate_row = row_of(a.gate, place);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Chunk update = load_chunk<kVectors>(a.update + at, own + c * step, width);
      const Chunk gate = load_chunk<kVectors>(gate_row, own + c * step, width);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) chunks[c].values[i] += update.values[i] * gate.values[i];
    }
    // A loop of its own: the compiler moves no load across a store, since the two may meet in memory.
#pragma unroll
    for (int c = 0; c < kChunks; ++c) store_chunk<kVectors>(a.x_new + at, own + c * step, write_width, chunks[c]);
  }
  if constexpr (kNorm) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum += chunks[c].values[i];
    }
    const float columns = static_cast<float>(width);
    const float mean = sum_of_row(sum, a.warps_per_row, slots[0]) / columns;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float centred = is_column<kVectors>(own + c * step, i, width) ? chunks[c].values[i] - mean : 0.0f;
        chunks[c].values[i] = centred;
        squares += centred * centred;
      }
    }
    const float inverse = 1.0f / sqrtf(sum_of_row(squares, a.warps_per_row, slots[1]) / columns + a.eps);
    const float *shift_row = row_of(a.shift, place), *scale_row = row_of(a.scale, place);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Chunk shift = load_chunk<kVectors>(shift_row, own + c * step, width);
      const Chunk scale = load_chunk<kVectors>(scale_row, own + c * step, width);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        chunks[c].values[i] = chunks[c].values[i] * inverse * (1.0f + scale.values[i]) + shift.values[i];
      }
    }
    if constexpr (std::is_same_v<Out, E4m3>) {
      __shared__ std::uint32_t largest_slots[kWarps];
      quantize_chunks<kVectors>(chunks, own, step, write_width, a.warps_per_row, largest_slots, a.normed + at,
                                a.norm_scale + row);
    } else {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) store_chunk<kVectors>(a.normed + at, own + c * step, write_width, chunks[c]);
    }
  }
}

inline bool table_takes_vectors(const FrameTable& table) {
  return takes_vectors(table.data, table.stream_stride) && table.clip_stride % 4 == 0 && table.frame_stride % 4 == 0;
}

// Tables that an op does not have are null pointers with strides 0, which take vectors.
template <class T, class Out>
bool all_take_vectors(const Arguments<T, Out>& a) {
  if (a.sizes.width % kChunk != 0) return false;
  const T* const pointers[] = {a.x, a.update, a.x_new};
  for (const T* pointer : pointers) {
    if (!takes_vectors(pointer, a.sizes.width)) return false;
  }
  if (reinterpret_cast<std::uintptr_t>(a.normed) % 16 != 0) return false;
  return table_takes_vectors(a.gate) && table_takes_vectors(a.shift) && table_takes_vectors(a.scale);
}

template <int kChunks, bool kVectors, bool kGate, bool kNorm, class T, class Out>
Status launch_chunks(void* stream, const Arguments<T, Out>& a) {
  const unsigned int grid = blocks_for(a.rows, kWarps / a.warps_per_row);
  U4D_LAUNCH((rows_kernel<T, Out, kChunks, kVectors, kGate, kNorm>), grid, kThreads, 0, stream, a);
  return launch_status();
}

// As few warps to a row as its registers allow: up to 1024 columns one warp, which needs no barrier;
// 1536 are two warps of three chunks.
template <bool kGate, bool kNorm, class T, class Out>
Status launch_rows(void* stream, Arguments<T, Out> a) {
  const Status status = check_rows(a.sizes);
  if (status != kOk) return status;
  a.rows = a.sizes.rows();
  if (a.rows == 0) return kOk;
  a.warps_per_row = 1;
  while (a.warps_per_row * kWarp * kMostChunks * kChunk < a.sizes.width) a.warps_per_row *= 2;
  const std::int64_t step = std::int64_t{a.warps_per_row} * kWarp * kChunk;
  if (!all_take_vectors(a)) return launch_chunks<kMostChunks, false, kGate, kNorm>(stream, a);
  if (a.sizes.width <= step) return launch_chunks<1, true, kGate, kNorm>(stream, a);
  if (a.sizes.width <= 2 * step) return launch_chunks<2, true, kGate, kNorm>(stream, a);
  if (a.sizes.width <= 3 * step) return launch_chunks<3, true, kGate, kNorm>(stream, a);
  return launch_chunks<kMostChunks, true, kGate, kNorm>(stream, a);
}

}  // namespace u4d::frame_rows
