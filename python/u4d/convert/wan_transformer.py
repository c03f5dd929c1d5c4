"""Wan2.1's transformer in its three forms on disk: diffusers' folder, the original folder, one original file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u4d.checkpoint import check_tensors, described_shapes
from u4d.checkpoint_files import (
    StoredTensor,
    check_fields,
    file_tensors,
    pickle_error,
    read_json,
    stored_tensors,
    weight_files,
)
from u4d.convert.original_names import PREFIX, diffusers_name, is_original
from u4d.errors import UserError

DIFFUSERS, ORIGINAL = "diffusers layout", "original release"
TAKE_INSTEAD = "take a text-to-video Wan2.1 such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
HEAD_DIM = 128  # of every Wan2.1; an original file alone does not tell it
SHARD = re.compile(r".*-\d+-of-\d+")

# What our Transformer is built for. Image-to-video, VACE and other models differ in one of these.
DIFFUSERS_VALUES: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "in_channels": 16,
    "out_channels": 16,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
ORIGINAL_VALUES: dict[str, Any] = {
    "model_type": "t2v",
    "patch_size": (1, 2, 2),
    "text_len": 512,
    "in_dim": 16,
    "out_dim": 16,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
ORIGINAL_SIZES = {
    "dim": 2048,
    "ffn_dim": 8192,
    "freq_dim": 256,
    "text_dim": 4096,
    "num_heads": 16,
    "num_layers": 32,
}  # with WanModel's defaults


@dataclass(frozen=True)
class WanTransformer:
    """A transformer on disk.

    Attributes:
        layout: "diffusers layout" or "original release".
        config: all fields of diffusers' `WanTransformer3DModel`.
        tensors: by diffusers' names; exactly those of that class.
    """

    layout: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_folder(folder: Path) -> WanTransformer:
    """The transformer of a folder with `config.json`.

    Raises:
        UserError: not a text-to-video Wan2.1, or damaged. File, field or tensor are named.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    kind = config.get("_class_name")
    if kind == "WanTransformer3DModel":
        tensors = stored_tensors(folder)
        complete = wan_defaults() | public(config)
        check_fields(config_file, config, wan_defaults())
        require_values(config_file, complete, DIFFUSERS_VALUES)
        return checked(WanTransformer(DIFFUSERS, complete, tensors), config_file, weight_files(folder)[0])
    if kind == "WanModel":
        check_fields(config_file, config, {**ORIGINAL_VALUES, **ORIGINAL_SIZES})
        require_values(config_file, ORIGINAL_VALUES | public(config), ORIGINAL_VALUES)
        complete = translated_config(config_file, config)
        tensors = renamed(stored_tensors(folder))
        return checked(WanTransformer(ORIGINAL, complete, tensors), config_file, weight_files(folder)[0])
    if kind == "Transformer":
        raise UserError(f"checkpoint {config_file}: this is a u4d checkpoint already; {TAKE_INSTEAD}")
    raise UserError(
        f"checkpoint {config_file}: _class_name: expected WanTransformer3DModel (diffusers) or WanModel (the original "
        f"release), got {kind!r}; {TAKE_INSTEAD}"
    )


def read_file(file: Path) -> WanTransformer:
    """The transformer of one safetensors file; its sizes are read off its tensors.

    Raises:
        UserError: a pickle, one shard of several, not a text-to-video Wan2.1, or damaged.
    """
    if file.suffix != ".safetensors":
        raise pickle_error(file)
    if SHARD.fullmatch(file.stem):
        raise UserError(f"checkpoint {file}: one shard of several; give the folder that holds them and their index")
    tensors = renamed(file_tensors(file))
    config = wan_defaults() | sizes_of(file, tensors)
    require_values(file, config, DIFFUSERS_VALUES)
    return checked(WanTransformer(ORIGINAL, config, tensors), file, file)


def checked(found: WanTransformer, config_file: Path, weights: Path) -> WanTransformer:
    """The same, after its tensors were compared with those of diffusers' class."""
    from diffusers import WanTransformer3DModel

    wanted = described_shapes(config_file, found.config, WanTransformer3DModel)
    check_tensors(found.tensors, wanted, "WanTransformer3DModel", weights)
    check_dtypes(found.tensors)
    return found


def check_dtypes(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise UserError for tensors that are not plain numbers of a usual width."""
    for tensor in tensors.values():
        if tensor.dtype not in ("F32", "BF16", "F16"):
            raise UserError(
                f"checkpoint {tensor.file}: tensor {tensor.key!r}: expected float32, bfloat16 or float16, "
                f"got {tensor.dtype}; take weights that are not quantised"
            )


def wan_defaults() -> dict[str, Any]:
    """Fields of diffusers' class and their default values."""
    from diffusers import WanTransformer3DModel

    return {name: parameter.default for name, parameter in inspect.signature(WanTransformer3DModel).parameters.items()}


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields that are diffusers' own."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def require_values(file: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise UserError unless those fields have the values that our Transformer is built for."""
    for name, wanted in expected.items():
        got = config[name]
        if (tuple(got) if isinstance(got, list) else got) != wanted:
            raise UserError(f"checkpoint {file}: {name}: expected {wanted!r}, got {got!r}; {TAKE_INSTEAD}")


def translated_config(config_file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' fields of an original `config.json`."""
    sizes = {name: config.get(name, default) for name, default in ORIGINAL_SIZES.items()}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"checkpoint {config_file}: {name}: expected a positive whole number, got {value!r}")
    width, heads = sizes.pop("dim"), sizes.pop("num_heads")
    if width % heads:
        raise UserError(f"checkpoint {config_file}: dim: expected a multiple of num_heads {heads}, got {width}")
    return wan_defaults() | sizes | {"num_attention_heads": heads, "attention_head_dim": width // heads}


def sizes_of(file: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """diffusers' fields that the shapes of the tensors tell."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"checkpoint {file}: tensor {name!r} is missing; {TAKE_INSTEAD}")
        found = tensors[name].shape
        if len(found) != dims:
            raise UserError(f"checkpoint {file}: tensor {name!r}: expected {dims} dimensions, got {list(found)}")
        return found

    width, in_channels, *patch = shape("patch_embedding.weight", 5)
    if width % HEAD_DIM:
        raise UserError(
            f"checkpoint {file}: expected a width that is a multiple of {HEAD_DIM}, got {width}: the number of heads "
            "is not known; give a folder with config.json"
        )
    patch_values = patch[0] * patch[1] * patch[2]
    blocks = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight", 2)[0] // max(patch_values, 1),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": max(blocks) + 1,
    }


def renamed(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under diffusers' names, whichever they have.

    Raises:
        UserError: a tensor that text-to-video Wan2.1 does not have.
    """
    if not is_original(set(tensors)):
        return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    found = {}
    for name, tensor in tensors.items():
        new_name = diffusers_name(name)
        if new_name is None:
            raise UserError(
                f"checkpoint {tensor.file}: tensor {name!r} is none of text-to-video Wan2.1's; {TAKE_INSTEAD}"
            )
        found[new_name] = tensor
    return found
