"""Layers whose weights carry one leading stream dimension.

Every stream (rgb, depth, ray_dir, ray_moment) has weights of its own, stored as one tensor under Wan's name, so
that a linear layer is one batched product over the streams. Activations are `[S,B,T,D]` throughout the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """One linear layer per stream: weight `[S,out,in]`, bias `[S,out]`."""

    def __init__(self, streams: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(streams, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(streams, out_features))
        nn.init.trunc_normal_(self.weight, std=1 / math.sqrt(in_features), a=-3, b=3)

    def forward(self, x: Tensor) -> Tensor:
        """`[S,...,in]` -> `[S,...,out]`."""
        flat = x.flatten(1, -2)
        return torch.baddbmm(self.bias[:, None], flat, self.weight.transpose(1, 2)).unflatten(1, x.shape[1:-1])


class StackedRMSNorm(nn.Module):
    """RMS norm over the full width, one scale per stream, as Wan's `rms_norm_across_heads`."""

    def __init__(self, streams: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(streams, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[S,B,T,D]` -> same shape and dtype; the statistics are float32."""
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x * inverse * self.weight[:, None, None]).type_as(x)


class StackedLayerNorm(nn.Module):
    """Affine layer norm, one scale and shift per stream, computed in float32."""

    def __init__(self, streams: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(streams, width))
        self.bias = nn.Parameter(torch.zeros(streams, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[S,B,T,D]` -> same shape and dtype."""
        normed = layer_norm(x, self.eps)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).type_as(x)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm without affine parameters, in float32."""
    return nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)
