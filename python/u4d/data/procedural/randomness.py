"""Deterministic random numbers: every clip owns a stream that depends on (split, seed, index) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SPLITS = {"train": 0, "val": 1, "test": 2}
SPLIT_LENGTHS = {"train": 1_000_000, "val": 1000, "test": 1000}
_INDEX_BITS = 30
_INDEX_MASK = (1 << _INDEX_BITS) - 1


def clip_seed(split: str, seed: int, index: int) -> int:
    """Mix (split, seed, index) into the 32 bits that torch's Mersenne twister really uses.

    The two top bits are the split, so no clip of one split can be a clip of another, whatever the seeds;
    the lower 30 bits are a bijection of the index for a fixed seed, so no two clips of a split are equal.

    Raises:
        ValueError: unknown split, or an index outside of it.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 <= index < SPLIT_LENGTHS[split]:
        raise ValueError(f"index: expected 0..{SPLIT_LENGTHS[split] - 1} in split {split!r}, got {index}")
    key = _splitmix64(seed & 0xFFFFFFFFFFFFFFFF)
    mixed = index
    for round_number in range(3):  # each step is invertible modulo 2^30
        mixed = (mixed ^ ((key >> (16 * round_number)) & _INDEX_MASK)) & _INDEX_MASK
        mixed = (mixed * 0x2C1B3C6D + 0x297A2D39) & _INDEX_MASK
        mixed ^= mixed >> 15
    return (SPLITS[split] << _INDEX_BITS) | mixed


def _splitmix64(value: int) -> int:
    mask = 0xFFFFFFFFFFFFFFFF
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


class UniformStream:
    """Pre-drawn uniform numbers of a batch of clips, read left to right.

    All layout code works on `[B, ...]` float64 tensors taken from here: batched, and equal for a clip whatever
    its neighbours in the batch are.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._used = 0

    @property
    def batch(self) -> int:
        """Number of clips."""
        return int(self._values.shape[0])

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers `[B, *shape]` in [low, high)."""
        count = math.prod(shape)
        if self._used + count > self._values.shape[1]:
            raise RuntimeError(f"stream of {self._values.shape[1]} numbers is used up: draw a longer block")
        block = self._values[:, self._used : self._used + count]
        self._used += count
        return low + (high - low) * block.reshape(self.batch, *shape)

    def log_uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """Numbers `[B, *shape]` whose logarithm is uniform between log(low) and log(high)."""
        return torch.exp(self.uniform(*shape, low=math.log(low), high=math.log(high)))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers `[B, *shape]`, cut at about 3.3 deviations."""
        return math.sqrt(2.0) * torch.erfinv(self.uniform(*shape, low=-0.999, high=0.999))

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Booleans `[B, *shape]`, true with the given probability."""
        return self.uniform(*shape) < probability

    def choice(self, weights: Sequence[float], *shape: int) -> Tensor:
        """Indices `[B, *shape]` (int64) drawn with the given relative weights."""
        edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        return torch.bucketize(self.uniform(*shape) * edges[-1], edges, right=True).clamp_max(len(weights) - 1)

    def unit_vectors(self, *shape: int) -> Tensor:
        """Directions `[B, *shape, 3]`, uniform on the sphere."""
        height = self.uniform(*shape, low=-1.0, high=1.0)
        angle = self.uniform(*shape, high=2.0 * math.pi)
        radius = (1.0 - height * height).clamp_min(0.0).sqrt()
        return torch.stack([radius * torch.cos(angle), height, radius * torch.sin(angle)], dim=-1)


def clip_streams(split: str, seed: int, indices: Sequence[int], lengths: Sequence[int]) -> list[UniformStream]:
    """Independent streams for the parts of a scene (cameras, objects, ...), one entry per length.

    Separate blocks keep the parts independent: a new number drawn for textures changes no camera.
    """
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(clip_seed(split, seed, int(index)))
        rows.append(torch.rand(sum(lengths), generator=generator, dtype=torch.float64))
    values = torch.stack(rows)
    starts = [sum(lengths[:part]) for part in range(len(lengths))]
    return [UniformStream(values[:, s : s + n]) for s, n in zip(starts, lengths, strict=True)]
