"""Checks of arguments, with errors that say what was wanted and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)


def describe(shape: Sequence[int]) -> str:
    """A shape as the errors print it: [2,50,3,3]."""
    return "[" + ",".join(str(size) for size in shape) + "]"


def check_tensor(name: str, tensor: object, pattern: Sequence[str | int]) -> None:
    """Check that an argument is a tensor; the pattern of its shape is for the error alone.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {describe_pattern(pattern)}, got {type(tensor).__name__}")


def check_shape(name: str, tensor: Tensor, pattern: Sequence[str | int]) -> None:
    """Check a tensor's dimensions against a pattern: a number must match, a letter stands for any size.

    Raises:
        ValueError: naming the argument, the wanted and the given shape.
        TypeError: it is no tensor.
    """
    check_tensor(name, tensor, pattern)
    shape = tensor.shape
    if len(shape) == len(pattern):
        for size, wanted in zip(shape, pattern, strict=True):
            if isinstance(wanted, int) and size != wanted:
                break
        else:
            return
    raise ValueError(f"{name}: expected {describe_pattern(pattern)}, got {describe(shape)}")


def describe_pattern(pattern: Sequence[str | int]) -> str:
    """A pattern as the errors print it: [B,N,3,3]."""
    return "[" + ",".join(str(part) for part in pattern) + "]"


def check_match(name: str, tensor: Tensor, shape: Sequence[int], other_name: str, other: Tensor) -> None:
    """Check that a tensor has exactly `shape`, which follows from another argument.

    Raises:
        ValueError: naming both arguments.
        TypeError: it is no tensor.
    """
    check_tensor(name, tensor, shape)
    if tuple(tensor.shape) != tuple(shape):
        wanted = f"{describe(shape)} to match {other_name} {describe(other.shape)}"
        raise ValueError(f"{name}: expected {wanted}, got {describe(tensor.shape)}")


def check_image_size(image_size: Sequence[int], multiple_of: int) -> tuple[int, int]:
    """(height, width) in pixels, each a positive multiple of `multiple_of`.

    Raises:
        ValueError: it is not.
    """
    if len(image_size) != 2:
        raise ValueError(f"image_size: expected (height, width), got {tuple(image_size)}")
    height, width = image_size
    if height <= 0 or width <= 0 or height % multiple_of or width % multiple_of:
        raise ValueError(f"image_size: expected positive multiples of {multiple_of}, got {(height, width)}")
    return height, width


def check_floating(**tensors: Tensor) -> None:
    """Check that every tensor has a floating dtype.

    Raises:
        TypeError: naming the first that has not.
    """
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def geometry_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that geometry is computed in: float64 if any tensor is, else float32.

    Half precision is promoted: 8 or 11 bits of mantissa are less than a camera needs.
    """
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32
