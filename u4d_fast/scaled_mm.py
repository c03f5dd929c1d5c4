"""torch's own product of e4m3 rows with their scales, `torch._scaled_mm`, for the streams of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu as gelu_of

from u4d_fast.fp8 import Fp8Rows

MULTIPLE = 16
"""Of which K and N are multiples."""

FROM = (9, 0)
"""The compute capability from which scales of rows and columns are taken."""


def takes_scaled_mm(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> bool:
    """Whether `scaled_mm_by_stream` gives this dtype for these rows, on their device."""
    if x.values.device.type != "cuda" or dtype != torch.bfloat16 or not x.values.numel() * weight.values.numel():
        return False
    whole = not any(size % MULTIPLE for size in weight.values.shape[1:])
    return whole and _takes_scales(x.values.device.index)


def _takes_scales(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= FROM


vars(_takes_scales)["_dynamo_marked_constant"] = True  # as in backend.py: torch.compile does not look inside


def scaled_mm_by_stream(x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`u4d_fast.grouped_linear_fp8` by torch, one stream after the other, in bfloat16.

    `torch._scaled_mm` wants x `[M,K]` row by row, the weight `[K,N]` column by column, scales `[M,1]` and `[1,N]` in
    float32, and the bias in the result's dtype. Without fast accumulation it adds up in float32, as our kernel does.
    """
    values, scale = x.values.flatten(1, -2).contiguous(), x.scale.flatten(1)[..., None].contiguous()
    weights, weight_scale = weight.values.contiguous(), weight.scale[:, None].contiguous()
    products = [
        torch._scaled_mm(
            values[stream],
            weights[stream].mT,
            scale_a=scale[stream],
            scale_b=weight_scale[stream],
            bias=None if bias is None else bias[stream].bfloat16(),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
        for stream in range(len(values))
    ]
    out = torch.stack(products).reshape(*x.values.shape[:-1], weight.values.shape[1])
    return gelu_of(out, approximate="tanh") if gelu else out
