// Which slots of which latent frame hold a frame; the kernels' form of u4d_fast/time_layout.py.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

namespace u4d {

constexpr int kSlots = 4;         // frames in a latent frame
constexpr int kRayChannels = 16;  // kSlots x 3 coordinates, then zeros

struct Slots {
  std::int64_t latent_frame;
  int first, last;  // of the latent frame's slots; more than one where the frame is repeated
};

inline bool is_layout(std::int64_t frames, std::int64_t latent_frames) {
  return frames >= 1 && latent_frames == (frames == 1 ? 1 : 2 + (frames - 2 + kSlots - 1) / kSlots);
}

U4D_HD Slots slots_of(std::int64_t frame, std::int64_t frames) {
  if (frame == 0) return {0, 0, kSlots - 1};
  if (frame == frames - 1) return {1 + (frames - 2 + kSlots - 1) / kSlots, 0, kSlots - 1};
  const int slot = static_cast<int>((frame - 1) % kSlots);
  // The last frame of a group that the clip does not fill stands in for the missing ones.
  return {1 + (frame - 1) / kSlots, slot, frame == frames - 2 ? kSlots - 1 : slot};
}

}  // namespace u4d
