// What the backward passes over rows beside tables share: their sizes, and the parts in which a frame's sums are made.
#pragma once

#include <cstdint>

#include "kernels/gated_residual_norm/frame_rows.h"

namespace u4d {

// The sums over a frame's rows are made in parts of `rows_per_part` rows, which are added up afterwards in a fixed
// order. A task of a kernel is one part of one frame.
struct FrameParts {
  std::int64_t groups, parts, rows_per_part;

  std::int64_t tasks() const { return groups * parts; }
};

inline FrameParts parts_of(const RowSizes& sizes, std::int64_t rows_per_part) {
  return {sizes.streams * sizes.batch * sizes.frames, (sizes.patches + rows_per_part - 1) / rows_per_part,
          rows_per_part};
}

inline Status check_parts(const RowSizes& sizes, std::int64_t rows_per_part) {
  const Status status = check_rows(sizes);
  return status == kOk && rows_per_part < 1 ? kInvalidArgument : status;
}

}  // namespace u4d
