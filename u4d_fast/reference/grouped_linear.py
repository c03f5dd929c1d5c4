"""Linear layers of several streams, each with a weight of its own, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu as gelu_of

from u4d_fast.fp8 import Fp8Rows


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Specification of `u4d_fast.grouped_linear`: same arguments and results, any floating dtype.

    In the dtype of x: in half precision the sum is rounded before GELU and again after it.
    """
    rows = x.flatten(1, -2)
    out = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.to(x.dtype)[:, None], rows, weight.mT)
    out = out.reshape(*x.shape[:-1], weight.shape[1])
    return gelu_of(out, approximate="tanh") if gelu else out


def grouped_linear_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias, by the chain rule; what goes into GELU is computed once more."""
    if gelu:
        grad = torch.ops.aten.gelu_backward(grad, grouped_linear(x, weight, bias), approximate="tanh")
    grad = grad.flatten(1, -2)
    grad_bias = None if bias is None else grad.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32))
    return (
        torch.bmm(grad, weight).reshape(x.shape),
        torch.bmm(grad.mT, x.flatten(1, -2)),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def grouped_linear_fp8(
    x: Fp8Rows,
    weight: Fp8Rows,
    bias: Tensor | None = None,
    gelu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Specification of `u4d_fast.grouped_linear_fp8`: the product of the values in float32, then the scales."""
    out = torch.bmm(x.values.float().flatten(1, -2), weight.values.float().mT)
    out = out * x.scale.flatten(1)[..., None] * weight.scale[:, None]
    if bias is not None:
        out = out + bias.float()[:, None]
    out = gelu_of(out, approximate="tanh") if gelu else out
    return out.to(dtype).reshape(*x.values.shape[:-1], weight.values.shape[1])
