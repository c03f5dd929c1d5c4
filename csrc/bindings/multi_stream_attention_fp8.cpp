#include "kernels/multi_stream_attention_fp8/multi_stream_attention_fp8.h"

#include "bindings/register.h"

// There is no CPU kernel: 8-bit products are of no use there.
void bind_multi_stream_attention_fp8([[maybe_unused]] pybind11::module_& m) {
#ifdef U4D_WITH_CUDA
  u4d::def_cuda(m, "multi_stream_attention_fp8_quantize_cuda", &u4d::multi_stream_attention_fp8_quantize_cuda);
  u4d::def_cuda(m, "multi_stream_attention_fp8_cuda", &u4d::multi_stream_attention_fp8_cuda);
#endif
}
