// The few questions about CUDA that bindings need answered without including CUDA's headers.
#pragma once

#include "kernels/common/status.h"

namespace u4d::cuda {

// The device that is current for this thread. Torch's copy of the CUDA runtime and ours share it: it is the driver's.
Status get_device(int* device);
Status set_device(int device);

// Text for a positive status.
const char* error_text(Status status);

}  // namespace u4d::cuda
