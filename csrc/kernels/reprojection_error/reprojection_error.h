// Masked mean absolute colour difference between frames j and frames i warped into their views (seed, test-time
// search), in one pass: nothing of size pairs x height x width is stored.
//
// All arrays are contiguous float32 unless said otherwise; pixel centres at .5; any sizes >= 0, height * width < 2^31:
//   rgb           [batch, frames, 3, height, width]
//   depth         [batch, frames, height, width]    along the optical axis; invalid: not finite or not positive
//   intrinsics    [batch, frames, 3, 3]             last row 0 0 1
//   cam_to_world  [batch, frames, 4, 4]             last row 0 0 0 1
//   pairs         int64 [pairs, 2]                  (i, j); a pair that names no frame counts as one without overlap
//   occlusion     relative tolerance of the occlusion test, negative: no test
//   rows_per_block  rows of a frame that are summed by one task; the caller's choice, as it sizes the scratch
//   geometry      [batch, pairs, 12]                scratch
//   block_sums    double [batch, pairs, ceil(height / rows_per_block), 2], scratch
//   pair_error    [batch, pairs]    1 without a visible pixel, +inf if a colour that counts is not finite
//   overlap       [batch, pairs]    share of j's pixels that are visible in i
//   error         [batch]           mean of pair_error
//
// Sums are taken in double over blocks that do not depend on the number of threads, in a fixed order: the same input
// gives the same bits. Launchers allocate nothing and do not synchronise; every output element is written. With zero
// pairs `error` is NaN (the op refuses that case).
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status reprojection_error_cpu(int threads, const float* rgb, const float* depth, const float* intrinsics,
                                         const float* cam_to_world, const int64_t* pairs, int64_t batch, int64_t frames,
                                         int64_t height, int64_t width, int64_t num_pairs, double occlusion,
                                         int64_t rows_per_block, float* geometry, double* block_sums, float* error,
                                         float* pair_error, float* overlap);
U4D_KERNEL Status reprojection_error_cuda(void* stream, const float* rgb, const float* depth, const float* intrinsics,
                                          const float* cam_to_world, const int64_t* pairs, int64_t batch,
                                          int64_t frames, int64_t height, int64_t width, int64_t num_pairs,
                                          double occlusion, int64_t rows_per_block, float* geometry, double* block_sums,
                                          float* error, float* pair_error, float* overlap);

}  // namespace u4d
