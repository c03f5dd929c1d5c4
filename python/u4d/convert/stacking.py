"""The tensors of the four-stream transformer, planned from those of Wan's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from u4d.checkpoint_files import DTYPES, StoredTensor
from u4d.convert.shards import PlannedTensor
from u4d.convert.starting_values import ENDS, fresh_ends
from u4d.diffusion.flow import STREAMS
from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig


def stack_streams(
    wan: Mapping[str, StoredTensor], config: TransformerConfig, dtype: torch.dtype, streams: Sequence[str]
) -> dict[str, PlannedTensor]:
    """Every tensor of the new transformer, in the order in which it lists them itself; the null text is zero.

    Args:
        wan: tensors of a Wan of the same sizes, by diffusers' names.
        config: sizes of the new transformer.
        dtype: see `result_dtype`.
        streams: those that get Wan's patch embedding and head; the others get fresh ones.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    width = config.num_attention_heads * config.attention_head_dim
    fresh = {} if set(streams) == set(STREAMS) else fresh_ends(width)
    tensors = {}
    for name, shape in shapes.items():
        if name == "null_text":
            tensors[name] = planned(torch.zeros(shape), dtype)
            continue
        stored = wan[name]
        if shape != (len(STREAMS), *stored.shape):
            raise RuntimeError(f"{name}: expected Wan's shape with one leading stream dimension, got {shape}")
        parts = partial(over_streams, stored, fresh.get(name) if name in ENDS else None, tuple(streams))
        tensors[name] = PlannedTensor(result_dtype(name, stored, dtype), shape, parts)
    return tensors


def over_streams(stored: StoredTensor, fresh: Tensor | None, streams: tuple[str, ...]) -> Iterator[Tensor]:
    """The tensor's values for one stream after the other."""
    values = stored.read()
    for index, stream in enumerate(STREAMS):
        yield values if fresh is None or stream in streams else fresh[index]


def result_dtype(name: str, stored: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is stored as: `dtype`, but float32 where the Transformer keeps it and the source has it."""
    exact = stored.dtype == "F32" and any(part in Transformer._keep_in_fp32_modules for part in name.split("."))
    return torch.float32 if exact else dtype


def planned(values: Tensor, dtype: torch.dtype) -> PlannedTensor:
    """A tensor that is at hand."""
    return PlannedTensor(dtype, tuple(values.shape), lambda: iter((values,)))


def unchanged(stored: StoredTensor) -> PlannedTensor:
    """A tensor as it is in its file."""

    def parts() -> Iterator[Tensor]:
        yield stored.read()

    return PlannedTensor(DTYPES[stored.dtype], stored.shape, parts)
