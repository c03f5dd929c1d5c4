"""Adapters on disk, in the layout of Hugging Face's `peft`: `adapter_config.json` and `adapter_model.safetensors`.

peft adapts a weight `[S,out,in]` as one of its `target_parameters`, with A stored as `[S*rank,in]` (stream by stream)
and B as `[out,rank*S]` (the streams innermost). That is its layout since 0.20; before, the two were swapped.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from u4d.checkpoint_files import DTYPES, file_tensors, pickle_error, read_json
from u4d.diffusion.flow import STREAMS
from u4d.errors import UserError
from u4d.model.lora import LoRAConfig, add_lora, find_targets, lora_layers, require_lora
from u4d.model.transformer import Transformer

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OURS = {CONFIG, WEIGHTS, "README.md"}  # peft adds the last one
PREFIX, WEIGHT = "base_model.model.", ".weight"
LAYOUT_SINCE = (0, 20)  # of peft

EMPTY: tuple[Any, ...] = (None, False, [], {})
# Fields of `adapter_config.json` that are used: what they must say, in words and as a test.
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_type": ('"LORA"', lambda value: value == "LORA"),
    "target_modules": ("none: a four-stream weight is one of target_parameters", lambda value: value in EMPTY),
    "target_parameters": (
        'weights, as in ["attn1.to_q.weight"]',
        lambda value: isinstance(value, list) and bool(value) and all(map(is_weight, value)),
    ),
    "peft_version": ("0.20 or newer: before, stacked weights had another layout", lambda value: has_layout(value)),
    "r": ("a positive whole number", lambda value: is_number(value, int) and value > 0),
    "lora_alpha": ("a finite number", lambda value: is_number(value)),
    "use_rslora": ("true or false", lambda value: value in (None, True, False)),
    "bias": ('"none"', lambda value: value in (None, "none")),
    "init_lora_weights": (
        'true, false or "gaussian": others change the base weights too',
        lambda value: value in (None, True, False, "gaussian"),
    ),
}
# Where an adapter comes from, what matters in training alone, and details of options that are off. Every other field
# must be empty: it might change what the adapter computes.
FREE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "revision", "task_type"}
FREE |= {"megatron_core", "qalora_group_size"}


def save_lora(transformer: Transformer, folder: str | Path, *, base: str = "") -> None:
    """Write the adapters as they are, replacing older ones only when the new ones are complete.

    Args:
        transformer: a model with adapters.
        folder: what to write; it may hold older adapters and nothing else.
        base: the checkpoint that they belong to, for the reader.
    Raises:
        UserError: there are no adapters, or the folder holds something else.
    """
    layers = require_lora(transformer)
    tensors = {}
    for name, layer in layers.items():
        tensors[tensor_name(name, "lora_A")] = layer.lora_A.flatten(0, 1)
        tensors[tensor_name(name, "lora_B")] = layer.lora_B.permute(1, 2, 0).flatten(1)
    config = next(iter(layers.values())).config
    targets = [target + WEIGHT for target in config.targets]
    fields = {"lora_alpha": config.alpha, "target_modules": [], "target_parameters": targets}
    write_folder(Path(folder), config.rank, base, fields, tensors)


def load_lora(transformer: Transformer, folder: str | Path, *, scale: float = 1.0) -> None:
    """Add the adapters of a folder that `save_lora` or peft wrote; the model is changed only when all of it fits.

    Args:
        transformer: the model that they were trained on; it is frozen, as by `add_lora`.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        scale: strength of the update; 1 as trained, 0 none.
    Raises:
        UserError: nothing there, a pickle, an option of peft that changes the result in ways not known here, tensors
            that are not exactly those of this model, or a model that has adapters. File and tensor are named.
    """
    if not math.isfinite(scale):
        raise UserError(f"scale: expected a finite number, got {scale!r}")
    folder = Path(folder)
    if (folder / PICKLE).exists():
        raise pickle_error(folder / PICKLE)
    for file in (folder / CONFIG, folder / WEIGHTS):
        if not file.is_file():
            raise UserError(f"adapter {folder}: expected {CONFIG} and {WEIGHTS}, found no {file.name}")
    config = read_adapter_config(folder / CONFIG)
    if lora_layers(transformer):
        raise UserError(f"adapter {folder}: the transformer has LoRA adapters; merge_lora or remove_lora them first")
    try:
        names = find_targets(transformer, config.targets)
    except UserError as error:
        raise UserError(f"adapter {folder / CONFIG}: field 'target_parameters': {error}") from error
    tensors = read_tensors(folder / WEIGHTS, tensor_shapes(transformer, names, config.rank))
    add_lora(transformer, replace(config, alpha=config.alpha * scale))
    with torch.no_grad():
        for name, layer in lora_layers(transformer).items():
            streams = len(layer.weight)
            down, up = (tensors[tensor_name(name, part)] for part in ("lora_A", "lora_B"))
            layer.lora_A.copy_(down.unflatten(0, (streams, config.rank)))
            layer.lora_B.copy_(up.unflatten(1, (config.rank, streams)).permute(2, 0, 1))


def export_stream_lora(transformer: Transformer, folder: str | Path, stream: str = "rgb") -> None:
    """Write one stream's adapters as ordinary LoRA of Wan's transformer, for diffusers and peft.

    The scale is multiplied into B, so that readers which know no alpha get it right.

    Raises:
        UserError: no such stream, no adapters, or a folder that holds something else.
    """
    if stream not in STREAMS:
        raise UserError(f"stream: expected one of {', '.join(STREAMS)}, got {stream!r}")
    layers, index = require_lora(transformer), STREAMS.index(stream)
    tensors = {}
    for name, layer in layers.items():
        tensors[tensor_name(name, "lora_A")] = layer.lora_A[index]
        tensors[tensor_name(name, "lora_B")] = layer.lora_B[index] * layer.config.scale
    config = next(iter(layers.values())).config
    fields = {"lora_alpha": config.rank, "target_modules": list(config.targets), "target_parameters": None}
    write_folder(Path(folder), config.rank, "", fields, tensors)


def tensor_name(layer: str, part: str) -> str:
    """The name of "lora_A" or "lora_B" of a layer in an adapter's file."""
    return f"{PREFIX}{layer}.{part}{WEIGHT}"


def tensor_shapes(transformer: Transformer, layers: list[str], rank: int) -> dict[str, list[int]]:
    """What an adapter's file must hold for those layers of the model."""
    shapes = {}
    for name in layers:
        streams, out_features, in_features = transformer.get_parameter(name + WEIGHT).shape
        shapes[tensor_name(name, "lora_A")] = [streams * rank, in_features]
        shapes[tensor_name(name, "lora_B")] = [out_features, rank * streams]
    return shapes


def read_tensors(file: Path, wanted: dict[str, list[int]]) -> dict[str, Tensor]:
    """The file's tensors, if they are exactly those wanted, and numbers.

    Raises:
        UserError: a damaged file, or a tensor that is missing, unknown, of another shape, or not finite.
    """
    found = file_tensors(file)
    for name, stored in found.items():
        if name not in wanted:
            raise UserError(f"adapter {file}: tensor {name!r} belongs to no layer that {CONFIG} targets in this model")
        if list(stored.shape) != wanted[name]:
            raise UserError(
                f"adapter {file}: tensor {name!r}: expected {wanted[name]} (the rank in {CONFIG}, times "
                f"{len(STREAMS)} streams; the widths of this model), got {list(stored.shape)}"
            )
        if stored.dtype not in DTYPES:
            raise UserError(f"adapter {file}: tensor {name!r}: expected {', '.join(DTYPES)}, got {stored.dtype}")
    for name in wanted:
        if name not in found:
            raise UserError(f"adapter {file}: tensor {name!r} is missing")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"adapter {file}: tensor {name!r}: expected finite numbers, got NaN or infinity")
    return tensors


def read_adapter_config(file: Path) -> LoRAConfig:
    """Rank, scale and targets of an `adapter_config.json`.

    Raises:
        UserError: not JSON, or a field whose value is not supported.
    """
    fields = read_json(file)
    for name, (expected, holds) in FIELDS.items():
        if not holds(fields.get(name)):
            raise UserError(f"adapter {file}: field {name!r}: expected {expected}, got {json.dumps(fields.get(name))}")
    for name, value in fields.items():
        if name not in FIELDS.keys() | FREE and value not in EMPTY:
            raise UserError(
                f"adapter {file}: field {name!r}: this option of peft is not supported: expected none, "
                f"got {json.dumps(value)}"
            )
    rank, alpha = fields["r"], float(fields["lora_alpha"])
    targets = tuple(target.removesuffix(WEIGHT) for target in fields["target_parameters"])
    return LoRAConfig(rank, alpha * math.sqrt(rank) if fields.get("use_rslora") else alpha, targets)


def has_layout(version: Any) -> bool:
    """Whether that is a version of peft with the layout of today."""
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return numbers is not None and tuple(map(int, numbers.groups())) >= LAYOUT_SINCE


def is_number(value: Any, kind: type[int] | tuple[type[int], type[float]] = (int, float)) -> bool:
    """Whether that is a finite number; JSON's true and false are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(float(value))


def is_weight(name: Any) -> bool:
    """Whether that is the name of a weight."""
    return isinstance(name, str) and name.endswith(WEIGHT)


def write_folder(folder: Path, rank: int, base: str, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write an adapter's two files beside the place, then rename.

    Raises:
        UserError: the folder holds other files than an adapter's.
    """
    if folder.exists() and not (folder.is_dir() and {part.name for part in folder.iterdir()} <= OURS):
        raise UserError(f"adapter {folder}: expected a new folder or one with older adapters, got other files there")
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    common = {
        "peft_type": "LORA",
        "peft_version": ".".join(map(str, (*LAYOUT_SINCE, 0))),
        "base_model_name_or_path": base or None,
        "r": rank,
        "bias": "none",
        "inference_mode": True,
    }
    (fresh / CONFIG).write_text(json.dumps(common | fields, indent=2) + "\n", encoding="utf-8")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, fresh / WEIGHTS, metadata={"format": "pt"})
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
