#include <cuda_runtime_api.h>

#include "kernels/common/device.h"

namespace u4d::cuda {

Status get_device(int* device) { return static_cast<Status>(cudaGetDevice(device)); }

Status set_device(int device) { return static_cast<Status>(cudaSetDevice(device)); }

const char* error_text(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace u4d::cuda
