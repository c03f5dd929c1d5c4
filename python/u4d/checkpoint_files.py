"""Files of a checkpoint, read without their weights: JSON, the headers of safetensors, the index of the shards.

Source of the formats: safetensors (8 bytes of length, a JSON header, raw data), and diffusers' and transformers' index.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from u4d.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"  # as transformers names them
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
CONVERT_PICKLE = (
    "import sys, torch; from safetensors.torch import save_file; "
    "tensors = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, sys.argv[2])"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        file, key: where it is.
        dtype: safetensors' name of it, such as "F32".
        shape: its sizes.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The values. The file is opened for them alone, so that no more of it stays in memory."""
        with safe_open(self.file, framework="pt") as tensors:
            values: Tensor = tensors.get_tensor(self.key)
            return values

    def read_row(self, index: int) -> Tensor:
        """The values at one index of the first dimension; no others are read."""
        with safe_open(self.file, framework="pt") as tensors:
            values: Tensor = tensors.get_slice(self.key)[index]
            return values


def stored_tensors(folder: Path, weights: str = WEIGHTS) -> dict[str, StoredTensor]:
    """All tensors of a model: of its one weight file, or of the shards that its index lists.

    Args:
        folder: of the model.
        weights: name of the weight file where there is only one.
    Raises:
        UserError: a pickle instead of safetensors, a file that is missing or damaged, or shards that do not hold
            exactly what their index says. File and tensor are named.
    """
    index_file = folder / f"{weights}.index.json"
    if not index_file.exists():
        return file_tensors(require_safetensors(folder / weights))
    found = {}
    listed = read_index(index_file)
    for shard in sorted(set(listed.values())):
        for name, tensor in file_tensors(require_safetensors(folder / shard)).items():
            where = f"checkpoint {tensor.file}: tensor {name!r}"
            if name not in listed:
                raise UserError(f"{where} is not listed in {index_file.name}")
            if listed[name] != shard:
                raise UserError(f"{where}: {index_file.name} lists it in {listed[name]}")
            found[name] = tensor
    for name, shard in listed.items():
        if name not in found:
            raise UserError(f"checkpoint {folder / shard}: tensor {name!r} is missing; {index_file.name} lists it here")
    return found


def weight_files(folder: Path, weights: str = WEIGHTS) -> list[Path]:
    """The one weight file of a model, or its index and the shards that it lists."""
    index_file = folder / f"{weights}.index.json"
    if not index_file.exists():
        return [folder / weights]
    return [index_file, *(folder / shard for shard in sorted(set(read_index(index_file).values())))]


def read_index(index_file: Path) -> dict[str, str]:
    """Tensor name -> shard, from an index of shards.

    Raises:
        UserError: it holds no such map, or names files outside its own folder.
    """
    listed = read_json(index_file).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"checkpoint {index_file}: expected a weight_map, found none")
    for shard in listed.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"checkpoint {index_file}: expected names of files beside it, got {shard!r}")
    return listed


def file_tensors(file: Path) -> dict[str, StoredTensor]:
    """What the header of a safetensors file lists; the file's length must fit the header.

    Raises:
        UserError: no such file, damaged, or cut short.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            # get_slice reads the header alone; its shape is a list.
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, name, str(part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {file}: missing, damaged or cut short: {first_line(error)}") from error


def require_safetensors(file: Path) -> Path:
    """The file, unless only a pickle of it is there.

    Raises:
        UserError: such a pickle, with the command that converts it.
    """
    if not file.exists():
        names = (file.stem, "pytorch_model") if file.name == TEXT_WEIGHTS else (file.stem,)
        for pickle in (file.with_name(name + suffix) for name in names for suffix in PICKLES):
            if pickle.exists():
                raise pickle_error(pickle)
    return file


def pickle_error(file: Path) -> UserError:
    """Why a pickle is refused, and the command that makes safetensors of it."""
    # transformers names its pickles pytorch_model.bin and its safetensors model.safetensors.
    stem = file.stem.removeprefix("pytorch_") if file.stem == "pytorch_model" else file.stem
    target = file.with_name(f"{stem}.safetensors")
    command = f'python -c "{CONVERT_PICKLE}" {shlex.quote(str(file))} {shlex.quote(str(target))}'
    return UserError(
        f"checkpoint {file}: only safetensors are read, since a pickle can run code when it is opened; "
        f"convert it, then move it away: {command}"
    )


def check_fields(config_file: Path, config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise UserError for a field that is not known; those that begin with an underscore are diffusers' own."""
    for name in config:
        if not name.startswith("_") and name not in known:
            raise UserError(f"checkpoint {config_file}: unknown field {name!r}; known are {', '.join(sorted(known))}")


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {file}: can't be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {file}: expected a JSON object, got {type(content).__name__}")
    return content


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
