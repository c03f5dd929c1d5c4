// Rows of activations [streams, batch, frames * patches, width] beside tables with one row per latent frame: what
// ada_layer_norm, gated_residual and gated_residual_norm share.
#pragma once

#include <cstdint>

#include "kernels/common/half_types.h"
#include "kernels/common/host_device.h"
#include "kernels/common/status.h"

namespace u4d {

constexpr std::int64_t kMaxWidth = 8192;  // a CUDA block keeps a row in its registers; u4d_fast/frame_tables.py knows

struct RowSizes {
  std::int64_t streams, batch, frames, patches, width;

  std::int64_t rows() const { return streams * batch * frames * patches; }
};

// A float32 table [streams, batch, frames, width] of any strides (0 where it was expanded); a row itself is dense.
struct FrameTable {
  const float* data;
  std::int64_t stream_stride, clip_stride, frame_stride;
};

// Where row `row` of the activations finds its row of a table.
struct FramePlace {
  std::int64_t stream, clip, frame;
};

U4D_HD FramePlace place_of(std::int64_t row, const RowSizes& sizes) {
  // 32 bits: a division of 64 is slow on a GPU, and check_rows refuses more rows.
  const std::uint32_t group = static_cast<std::uint32_t>(row) / static_cast<std::uint32_t>(sizes.patches);
  const std::uint32_t by_clip = group / static_cast<std::uint32_t>(sizes.frames);
  const std::uint32_t stream = by_clip / static_cast<std::uint32_t>(sizes.batch);
  return {stream, by_clip - stream * static_cast<std::uint32_t>(sizes.batch),
          group - by_clip * static_cast<std::uint32_t>(sizes.frames)};
}

U4D_HD const float* row_of(const FrameTable& table, const FramePlace& place) {
  return table.data + place.stream * table.stream_stride + place.clip * table.clip_stride +
         place.frame * table.frame_stride;
}

inline Status check_rows(const RowSizes& sizes) {
  if (sizes.streams < 0 || sizes.batch < 0 || sizes.frames < 1 || sizes.patches < 0 || sizes.width < 1) {
    return kInvalidArgument;
  }
  return sizes.width > kMaxWidth || sizes.rows() > INT32_MAX ? kTooLarge : kOk;
}

}  // namespace u4d
