"""Which attention was fastest where: measured times per (device, dtype, head dimension, lengths), as one small file.

`u4d bench attention --save` writes the user's file; one that ships with the package is read after it. Nothing here is
needed for a right answer, so a damaged file is a warning.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "attention_table.json"
CACHE_VARIABLE = "U4D_CACHE"


@dataclass(frozen=True)
class Measured:
    """The times of one shape on one device.

    Attributes:
        device: the GPU's name, or "cpu".
        dtype: "bfloat16", ...
        head_dim: d.
        tokens, keys: queries and keys of a clip.
        forward_ms: milliseconds of each backend, {"torch-cudnn": 1.5, ...}.
        training_ms: the same of forward and backward together.
        torch: the version of torch.
    """

    device: str
    dtype: str
    head_dim: int
    tokens: int
    keys: int
    forward_ms: Mapping[str, float]
    training_ms: Mapping[str, float]
    torch: str = ""

    def place(self) -> tuple[Any, ...]:
        """What two measurements share of which one replaces the other."""
        return self.device, self.dtype, self.head_dim, bucket(self.tokens), bucket(self.keys)


@dataclass(frozen=True)
class Ranking:
    """Backends by their time, for one head dimension and a range of lengths; the fastest first."""

    head_dim: int
    tokens: tuple[int, int]
    keys: tuple[int, int]
    forward: tuple[str, ...]
    training: tuple[str, ...]


def bucket(length: int) -> tuple[int, int]:
    """The lengths that a measurement speaks for: within about a factor of sqrt(2) of a power of two.

    Returns:
        The first length and the one after the last: 16,800 -> (11586, 23171).
    """
    power = round(math.log2(max(length, 1)))
    return math.ceil(2 ** (power - 0.5)), math.ceil(2 ** (power + 0.5))


def user_file() -> Path:
    """Where this user's measurements lie."""
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "u4d"
    return folder / "attention.json"


def device_name(device: torch.device) -> str:
    """The name that a device has in the table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def save_measured(measured: Measured, file: Path | None = None) -> Path:
    """Add a measurement to the user's file, in place of an older one of the same bucket.

    Raises:
        OSError: the file can't be written.
    """
    file = file or user_file()
    kept = [one for one in read_measured(file) if one.place() != measured.place()]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps({"measured": [asdict(one) for one in (*kept, measured)]}, indent=1) + "\n")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    forget_rankings()
    return file


def read_measured(file: Path) -> list[Measured]:
    """The measurements of a file; none, with a warning, where it is damaged."""
    try:
        return [Measured(**row) for row in json.loads(file.read_text())["measured"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{file}: no table of attention times ({error}): nothing is taken from it", stacklevel=2)
        return []


def rankings(device_type: str, device_index: int, dtype: torch.dtype) -> tuple[Ranking, ...]:
    """What was measured on this device, the user's own first; index -1 where a device has none."""
    return _rankings(device_type, device_index, dtype)


def unmeasured(device_type: str, device_index: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends to try where nothing was measured, before torch's own choice.

    cuDNN's on Hopper in half precision: about 700 TFLOP/s are published for it (cuDNN 9.19, H200) where torch's own
    FlashAttention is version 2, which was not written for that chip.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device_type != "cuda" or not half or torch.cuda.get_device_capability(device_index) != (9, 0):
        return ()
    return ("torch-cudnn",)


# What torch.compiler.assume_constant_result does, without the second that importing torch._dynamo takes: what was
# measured does not change while a graph is traced.
vars(rankings)["_dynamo_marked_constant"] = True
vars(unmeasured)["_dynamo_marked_constant"] = True


def forget_rankings() -> None:
    """Read the files again when they are next asked for."""
    _rankings.cache_clear()


@lru_cache(maxsize=64)
def _rankings(device_type: str, device_index: int, dtype: torch.dtype) -> tuple[Ranking, ...]:
    device = torch.device(device_type, device_index) if device_index >= 0 else torch.device(device_type)
    name, kind = device_name(device), str(dtype).removeprefix("torch.")
    rows = [*read_measured(user_file()), *read_measured(SHIPPED)]
    return tuple(ranking(row) for row in rows if (row.device, row.dtype) == (name, kind))


def ranking(measured: Measured) -> Ranking:
    """The order of the backends of one measurement."""
    forward, training = (
        tuple(sorted(times, key=times.__getitem__)) for times in (measured.forward_ms, measured.training_ms)
    )
    return Ranking(measured.head_dim, bucket(measured.tokens), bucket(measured.keys), forward, training)
