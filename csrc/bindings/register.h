// How a launcher becomes a Python function: pointers cross as integers, a status turns into an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/common/device.h"
#include "kernels/common/status.h"

namespace u4d {

inline void raise_unless_ok(Status status, const char* op) {
  if (status == kOk) return;
  std::string text = std::string(op) + ": ";
  if (status == kInvalidArgument) throw std::invalid_argument(text + "sizes break the kernel's contract");
  if (status == kTooLarge) throw std::invalid_argument(text + "a size is larger than the kernel supports");
#ifdef U4D_WITH_CUDA
  if (status > 0) throw std::runtime_error(text + "CUDA error: " + cuda::error_text(status));
#endif
  throw std::runtime_error(text + "unknown status " + std::to_string(status));
}

template <class T>
using Crossing = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T arrive(Crossing<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

// Registers `kernel(...)` as `name(...)` with the same arguments, all positional.
template <class... Args>
void def_cpu(pybind11::module_& m, const char* name, Status (*kernel)(Args...)) {
  m.def(name, [=](Crossing<Args>... args) {
    Status status;
    {
      pybind11::gil_scoped_release release;
      status = kernel(arrive<Args>(args)...);
    }
    raise_unless_ok(status, name);
  });
}

#ifdef U4D_WITH_CUDA
// Registers `kernel(stream, ...)` as `name(device, stream, ...)`; a launch is asynchronous, so the GIL is kept.
template <class... Args>
void def_cuda(pybind11::module_& m, const char* name, Status (*kernel)(void*, Args...)) {
  m.def(name, [=](int device, std::uintptr_t stream, Crossing<Args>... args) {
    int before = device;
    raise_unless_ok(cuda::get_device(&before), name);
    raise_unless_ok(cuda::set_device(device), name);
    const Status status = kernel(reinterpret_cast<void*>(stream), arrive<Args>(args)...);
    // Torch goes on with the device that it had made current.
    if (before != device) raise_unless_ok(cuda::set_device(before), name);
    raise_unless_ok(status, name);
  });
}
#endif

}  // namespace u4d
