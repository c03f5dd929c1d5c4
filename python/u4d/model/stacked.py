"""Layers whose weights carry one leading stream dimension.

Every stream (rgb, depth, ray_dir, ray_moment) has weights of its own, stored as one tensor under Wan's name, so
that a linear layer is one batched product over the streams. Activations are `[S,B,T,D]` throughout the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import u4d_fast


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

    def product(self, x: Tensor) -> Tensor:
        """The same without the bias, for whoever adds it together with what comes next."""
        return torch.bmm(x.flatten(1, -2), self.weight.transpose(1, 2)).unflatten(1, x.shape[1:-1])


class StackedRMSNorm(nn.Module):
    """RMS norm over the full width, one scale per stream, as Wan's `rms_norm_across_heads`."""

    def __init__(self, streams: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(streams, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[S,B,T,D]` -> same shape and dtype; computed in float32."""
        return u4d_fast.rms_norm(x, self.weight, self.eps)


class StackedLayerNorm(nn.Module):
    """Affine layer norm, one scale and shift per stream, computed in float32."""

    def __init__(self, streams: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(streams, width))
        self.bias = nn.Parameter(torch.zeros(streams, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[S,B,T,D]` -> same shape and dtype."""
        return u4d_fast.ada_layer_norm(x, *self.tables(x[:, :, :1]), self.eps)

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale as an adaptive layer norm takes them: the same for all clips and latent frames of `like`.

        like `[S,B,F,D]`; both are views that broadcast.
        """
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return self.bias[:, None, None].expand_as(like), (weight - 1)[:, None, None].expand_as(like)
