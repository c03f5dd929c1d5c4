// What every kernel launcher returns.
#pragma once

// Launchers have C linkage: the C++ runtime and the tests (through ctypes) find them by their plain name. They take
// pointers, int64_t and double only.
#define U4D_KERNEL extern "C"

namespace u4d {

// Zero is success, negative values are ours, positive values are cudaError_t.
using Status = int;

constexpr Status kOk = 0;
constexpr Status kInvalidArgument = -1;  // a size is negative, or breaks the contract in the op's header
constexpr Status kTooLarge = -2;         // a size does not fit what the kernel was written for

}  // namespace u4d
