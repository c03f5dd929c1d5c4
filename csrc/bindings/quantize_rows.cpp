#include "kernels/quantize_rows/quantize_rows.h"

#include "bindings/register.h"

void bind_quantize_rows(pybind11::module_& m) {
  u4d::def_cpu(m, "quantize_rows_cpu", &u4d::quantize_rows_cpu);
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "quantize_rows_cuda", &u4d::quantize_rows_cuda);
#endif
}
