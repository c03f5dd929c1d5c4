"""Layers whose weights carry one leading stream dimension.

Every stream (rgb, depth, ray_dir, ray_moment) has weights of its own, stored as one tensor under Wan's name, so
that a linear layer is one batched product over the streams. Activations are `[S,B,T,D]` throughout the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

import u4d_fast
from u4d_fast import Fp8Rows


class StackedLinear(nn.Module):
    """One linear layer per stream: weight `[S,out,in]`, bias `[S,out]`.

    Of fp8 rows it makes the product in fp8, without gradients.
    """

    def __init__(self, streams: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(streams, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(streams, out_features))
        nn.init.trunc_normal_(self.weight, std=1 / math.sqrt(in_features), a=-3, b=3)
        self._in_fp8: tuple[tuple[object, ...], Fp8Rows] | None = None

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """`[S,...,in]` -> `[S,...,out]`, in the weight's dtype."""
        if isinstance(x, Fp8Rows):
            return u4d_fast.grouped_linear_fp8(x, self.weight_in_fp8(), self.bias, dtype=self.weight.dtype)
        if x.dtype == self.weight.dtype:
            return u4d_fast.grouped_linear(x, self.weight, self.bias)
        flat = x.flatten(1, -2)  # autocast makes the dtypes meet
        return torch.baddbmm(self.bias[:, None], flat, self.weight.mT).unflatten(1, x.shape[1:-1])

    def product(self, x: Tensor | Fp8Rows) -> Tensor:
        """The same without the bias, for whoever adds it together with what comes next."""
        if isinstance(x, Fp8Rows):
            return u4d_fast.grouped_linear_fp8(x, self.weight_in_fp8(), None, dtype=self.weight.dtype)
        return torch.bmm(x.flatten(1, -2), self.weight.transpose(1, 2)).unflatten(1, x.shape[1:-1])

    @torch.no_grad()
    def weight_in_fp8(self) -> Fp8Rows:
        """The weight as fp8 rows, one scale per output channel; kept until the weight changes or moves.

        A compiled program takes what is kept as it is. It sees that a weight was loaded or moved, and not what else was
        written into it: `forget_fp8` then.
        """
        if torch.compiler.is_compiling():  # a trace sees neither addresses nor versions
            return u4d_fast.quantize_rows(self.weight) if self._in_fp8 is None else self._in_fp8[1]
        weight = self.weight
        state = (weight.device, weight.data_ptr(), None if weight.is_inference() else weight._version)
        if self._in_fp8 is None or self._in_fp8[0] != state:
            self._in_fp8 = (state, u4d_fast.quantize_rows(weight))
        return self._in_fp8[1]

    def forget_fp8(self) -> None:
        """Give the memory of the weight's fp8 form back."""
        self._in_fp8 = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts: under offload the fp8 form must not stay on the GPU when the weight leaves it."""
        self.forget_fp8()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *given: Any) -> None:
        self.forget_fp8()
        super()._load_from_state_dict(*given)


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
