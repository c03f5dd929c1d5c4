#include "kernels/grouped_linear/grouped_linear.h"

#include "bindings/register.h"

// There is no CPU kernel: torch's own products are what runs there.
void bind_grouped_linear([[maybe_unused]] pybind11::module_& m) {
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "grouped_linear_cuda", &u4d::grouped_linear_cuda);
  u4d::def_cuda(m, "grouped_linear_fp8_cuda", &u4d::grouped_linear_fp8_cuda);
#endif
}
