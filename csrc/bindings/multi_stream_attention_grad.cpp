#include "kernels/multi_stream_attention_grad/multi_stream_attention_grad.h"

#include "bindings/register.h"

// There is no CPU kernel: torch's own attention is what runs there, and is differentiated.
void bind_multi_stream_attention_grad([[maybe_unused]] pybind11::module_& m) {
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "multi_stream_attention_grad_cuda", &u4d::multi_stream_attention_grad_cuda);
#endif
}
