// The Python module u4d_fast._kernels. bindings.inc lists every other file of this folder, hopper_ops.inc the folders
// of kernels/ whose CUDA kernels run on Hopper alone (see csrc/CMakeLists.txt).
#include <pybind11/pybind11.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#define U4D_BINDING(op) void bind_##op(pybind11::module_& m);
#include "bindings.inc"
#undef U4D_BINDING

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "Kernels of u4d_fast: raw pointers, sizes and a stream in, nothing out. Use u4d_fast.<op> instead.";

  pybind11::list ops;
#define U4D_BINDING(op) \
  bind_##op(m);         \
  ops.append(#op);
#include "bindings.inc"
#undef U4D_BINDING
  m.attr("ops") = pybind11::tuple(ops);

  pybind11::list hopper_ops;
#define U4D_HOPPER_OP(op) hopper_ops.append(#op);
#include "hopper_ops.inc"
#undef U4D_HOPPER_OP
  m.attr("hopper_ops") = pybind11::tuple(hopper_ops);

#ifdef U4D_WITH_CUDA
  m.attr("cuda_arch") = "sm_" U4D_CUDA_ARCH;
#else
  m.attr("cuda_arch") = pybind11::none();
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
