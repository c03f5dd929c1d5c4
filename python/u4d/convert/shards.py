"""Weight files written tensor by tensor, byte for byte as diffusers' `save_pretrained` writes them.

The layout of the shards is planned from shapes alone; a tensor's values are asked for when its place in the file has
come, so that never more than one of them is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u4d.checkpoint_files import DTYPES, WEIGHTS

SAFETENSORS_NAME = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the data behind the header


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written.

    Attributes:
        dtype, shape: what it will be.
        parts: makes its values in order, in pieces along the first dimension, in any dtype.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Size of its values in the file."""
        return self.placeholder().untyped_storage().nbytes()

    def placeholder(self) -> Tensor:
        """The same shape without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def write_weights(
    folder: Path, tensors: Mapping[str, PlannedTensor], shard_bytes: int, progress: Callable[[int, int], None]
) -> None:
    """Write one weight file, or several and their index where they take more than `shard_bytes`.

    Args:
        folder: an existing one.
        tensors: by name, in the order in which they fill the shards.
        shard_bytes: the most bytes of a file; a larger tensor has a file of its own.
        progress: called as progress(bytes done, bytes in all).
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(
        {name: tensor.placeholder() for name, tensor in tensors.items()},
        max_shard_size=shard_bytes,
        filename_pattern=WEIGHTS.replace(".safetensors", "{suffix}.safetensors"),
    )
    total, done = sum(tensor.num_bytes for tensor in tensors.values()), 0
    for file_name, names in plan.filename_to_tensors.items():
        for written in write_safetensors(folder / file_name, {name: tensors[name] for name in names}):
            done += written
            progress(done, total)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{WEIGHTS}.index.json").write_text(text, encoding="utf-8")


def write_safetensors(file: Path, tensors: Mapping[str, PlannedTensor]) -> Iterator[int]:
    """Write a safetensors file; yields the bytes of each piece when it is written.

    Order and padding are those of the safetensors library: wide numbers first, so that all are aligned, then by name.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.num_bytes
        dtype = SAFETENSORS_NAME[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with open(file, "wb") as out:
        out.write(len(encoded).to_bytes(8, "little"))
        out.write(encoded)
        for name, tensor in ordered:
            before = out.tell()
            for part in tensor.parts():
                values = part.to(tensor.dtype).contiguous().flatten()
                yield out.write(values.view(torch.uint8).numpy().data)
            if out.tell() - before != tensor.num_bytes:
                raise RuntimeError(f"{file}: tensor {name!r}: wrote {out.tell() - before} of {tensor.num_bytes} bytes")
