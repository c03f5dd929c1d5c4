"""Tensors of e4m3 with a float32 scale per row, which fp8 linear layers multiply."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fp8Rows(NamedTuple):
    """Rows x `[...,D]` as x ~ values * scale[..., None].

    The largest magnitude of a row lies on 448, the largest number of e4m3: scale = amax / 448. A row of zeros has the
    scale 1, and one with NaN or infinity in it the scale NaN.

    Attributes:
        values: [...,D] float8_e4m3fn.
        scale: [...] float32, one for each row.
    """

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The rows as float32 `[...,D]`."""
        return self.values.float() * self.scale[..., None]


def new_rows(x: Tensor, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Memory beside x for the values and the scales of rows, of x's shape or another `[...,D]`."""
    shape = tuple(x.shape) if shape is None else shape
    return x.new_empty(shape, dtype=torch.float8_e4m3fn), x.new_empty(shape[:-1], dtype=torch.float32)


def refuse_gradients(op: str, **tensors: Tensor) -> None:
    """An op that rounds to 8 bits has no gradients.

    Raises:
        ValueError: one is wanted.
    """
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op} has no gradients, but {name} requires one; use torch.no_grad()")
