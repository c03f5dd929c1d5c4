// A CUDA kernel that makes rows of e4m3 of whatever a source computes from columns alone: quantize_rows, bias_gelu_fp8.
//
// A row is read once, kept in the registers of one to sixteen warps until its largest magnitude is known, and written
// once. A block holds as many rows as make eight warps, or one row that takes more.
//
// A source has
//   load<kVectors>(row, first, width) -> Chunk        what must come from memory first
//   finish<kVectors>(chunk, row, first, width)        the values to quantise, in place; zeros beyond the row's end
#pragma once

#include "kernels/common/launch.h"
#include "kernels/quantize_rows/quantize_chunks.cuh"
#include "kernels/quantize_rows/quantize_rows.h"

namespace u4d::quantized {

using frame_rows::Chunk, frame_rows::kChunk, frame_rows::kMostChunks;

constexpr int kFullBlock = 8, kMostWarps = 16;  // warps of a block
static_assert(kMostQuantized == std::int64_t{kMostWarps} * kWarp * kMostChunks * kChunk);

template <class Source, int kChunks, bool kVectors>
__global__ __launch_bounds__(kMostWarps* kWarp) void quantize_kernel(const Source source, E4m3* values, float* scale,
                                                                     std::int64_t rows, int width, int warps_per_row,
                                                                     int rows_per_block) {
  __shared__ std::uint32_t slots[kMostWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int row_of_block = thread / kWarp / warps_per_row;
  const std::int64_t given = static_cast<std::int64_t>(blockIdx.x) * rows_per_block + row_of_block;
  // A row behind the last one is computed like the last, so that all threads meet the barrier, and not written.
  const std::int64_t row = given < rows ? given : rows - 1;
  const int own = (thread - row_of_block * warps_per_row * kWarp) * kChunk, step = warps_per_row * kWarp * kChunk;
  Chunk chunks[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) chunks[c] = source.template load<kVectors>(row, own + c * step, width);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) source.template finish<kVectors>(chunks[c], row, own + c * step, width);
  quantize_chunks<kVectors>(chunks, own, step, given < rows ? width : 0, warps_per_row, slots, values + row * width,
                            scale + row);
}

template <int kChunks, bool kVectors, class Source>
Status launch_chunks(void* stream, const Source& source, E4m3* values, float* scale, std::int64_t rows, int width,
                     int warps_per_row) {
  const int rows_per_block = warps_per_row < kFullBlock ? kFullBlock / warps_per_row : 1;
  U4D_LAUNCH((quantize_kernel<Source, kChunks, kVectors>), blocks_for(rows, rows_per_block),
             rows_per_block * warps_per_row * kWarp, 0, stream, source, values, scale, rows, width, warps_per_row,
             rows_per_block);
  return launch_status();
}

// `vectors`: the source can be read by vectors.
template <class Source>
Status launch(void* stream, const Source& source, bool vectors, E4m3* values, float* scale, std::int64_t rows,
              std::int64_t columns) {
  const Status status = check_quantized(rows, columns);
  if (status != kOk || rows == 0) return status;
  constexpr int kMost = kWarp * kMostChunks * kChunk;  // columns of a warp
  const int width = static_cast<int>(columns), warps = (width + kMost - 1) / kMost, step = warps * kWarp * kChunk;
  if (!vectors || width % kChunk != 0 || reinterpret_cast<std::uintptr_t>(values) % alignof(Codes) != 0) {
    return launch_chunks<kMostChunks, false>(stream, source, values, scale, rows, width, warps);
  }
  if (width <= step) return launch_chunks<1, true>(stream, source, values, scale, rows, width, warps);
  if (width <= 2 * step) return launch_chunks<2, true>(stream, source, values, scale, rows, width, warps);
  if (width <= 3 * step) return launch_chunks<3, true>(stream, source, values, scale, rows, width, warps);
  return launch_chunks<kMostChunks, true>(stream, source, values, scale, rows, width, warps);
}

}  // namespace u4d::quantized
