"""Bias and tanh GELU, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu

from u4d_fast.reference.ada_layer_norm import compute_dtype


def bias_gelu(x: Tensor, bias: Tensor, inplace: bool = False) -> Tensor:
    """Specification of `u4d_fast.bias_gelu`: same arguments and results, any floating dtype."""
    activated = gelu(biased(x, bias), approximate="tanh").to(x.dtype)
    return x.copy_(activated) if inplace else activated


def bias_gelu_grad(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias, by the chain rule written out."""
    v = biased(x, bias)
    factor, cube = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(factor * (v + cube * v**3))
    slope = 0.5 * (1 + tanh) + 0.5 * v * (1 - tanh**2) * factor * (1 + 3 * cube * v**2)
    grad_v = grad.to(v.dtype) * slope
    return grad_v.to(x.dtype), grad_v.flatten(1, -2).sum(1).to(bias.dtype)


def biased(x: Tensor, bias: Tensor) -> Tensor:
    """x `[S,...,D]` + bias `[S,D]`, in the dtype of computation."""
    dtype = compute_dtype(x)
    return x.to(dtype) + bias.to(dtype).reshape(bias.shape[0], *(1 for _ in x.shape[2:]), bias.shape[1])
