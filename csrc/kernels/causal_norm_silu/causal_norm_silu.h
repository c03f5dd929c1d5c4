// RMS norm over channels and SiLU of a sum, behind two earlier frames: what a causal convolution of Wan's VAE reads.
// Specification: u4d_fast/reference/causal_norm_silu.py.
//
// Arguments of both launchers; rows are the pixels of a clip, frame by frame:
//   x         [batch, rows, width], contiguous, of the type `dtype` (common/half_types.h)
//   residual  like x, or null: nothing is added
//   before    [batch, front, width] like x, or null: zeros
//   gamma     [width], of the type `weight_dtype`: `dtype` or float32
//   bias      like gamma, or null: nothing is added
//   total     like x, out: x + bias + residual; not touched where residual is null
//   normed    [batch, front + rows, width], out: `before`, then silu(norm(x + bias + residual) gamma)
//   No alignment is asked for; 16 bytes throughout are fastest. `total` and `normed` overlap nothing.
//
// A row's norm is that of its sum as `total` has it; where there is no residual, of the sum before any rounding. A row
// whose length is below 1e-12 is divided by 1e-12 instead. Arithmetic is float32 with one rounding at the end; NaN
// stays NaN. Nothing is allocated and nothing waited for.
#pragma once

#include <cstdint>

#include "kernels/common/status.h"

namespace u4d {

U4D_KERNEL Status causal_norm_silu_cpu(int num_threads, const void* x, const void* residual, const void* before,
                                       const void* gamma, const void* bias, void* total, void* normed,
                                       std::int64_t dtype, std::int64_t weight_dtype, std::int64_t batch,
                                       std::int64_t rows, std::int64_t front, std::int64_t width);

U4D_KERNEL Status causal_norm_silu_cuda(void* stream, const void* x, const void* residual, const void* before,
                                        const void* gamma, const void* bias, void* total, void* normed,
                                        std::int64_t dtype, std::int64_t weight_dtype, std::int64_t batch,
                                        std::int64_t rows, std::int64_t front, std::int64_t width);

}  // namespace u4d
