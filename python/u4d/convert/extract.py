"""A Wan checkpoint from one stream of a four-stream one: the way back from `init_from_wan`, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u4d.checkpoint import (
    INDEX,
    check_folder,
    check_new_checkpoint,
    check_weights,
    find_checkpoint,
    new_checkpoint,
    read_components,
)
from u4d.checkpoint_files import DTYPES, TEXT_WEIGHTS, WEIGHTS, StoredTensor, read_json
from u4d.convert.conversion import SHARD_BYTES, Conversion, Progress, folder_size, no_progress
from u4d.convert.folders import check_place, copy_part, part_files, write_index, write_model
from u4d.convert.shards import PlannedTensor
from u4d.diffusion.flow import STREAMS
from u4d.errors import UserError
from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig, read_config

WAN_VAE = ["diffusers", "AutoencoderKLWan"]
WHY = {
    "null_text": "Wan encodes an empty prompt itself",
    "motion": "this checkpoint feeds local motion to its RGB tokens; Wan has no such part and will answer differently",
    "link": "this checkpoint adds RGB tokens to those of geometry; one stream alone has no use for it",
}


def extract_stream(
    source: str | Path,
    out_dir: str | Path,
    stream: str = "rgb",
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = no_progress,
) -> Conversion:
    """Write one stream's weights as a diffusers folder of Wan2.1; names, dtypes and values are the stream's own.

    Args:
        source: a u4d checkpoint (shipped preset, folder, hub id), or the folder of its transformer alone.
        out_dir: the new folder; it appears whole or not at all.
        stream: "rgb", "depth", "ray_dir" or "ray_moment".
        overwrite: replace an older checkpoint.
        shard_bytes: the most bytes of a weight file.
        progress: called as progress(part, bytes done, bytes in all).
    Returns:
        what was made and what Wan has no place for.
    Raises:
        UserError: no such stream, no u4d checkpoint, a damaged one, or a place that can't be written to.
    """
    if stream not in STREAMS:
        raise UserError(f"stream: expected one of {', '.join(STREAMS)}, got {stream!r}")
    out = Path(out_dir)
    check_new_checkpoint(out, overwrite)
    transformer, folder = locate(source)
    stored = check_weights(transformer, Transformer)
    config = read_config(TransformerConfig, read_json(transformer / "config.json"))
    tensors, extras = slice_stream(stored, config, STREAMS.index(stream))
    parts, missing = ({}, []) if folder is None else parts_to_copy(folder)
    files = [file for part in parts.values() for file in part]
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values()) + sum(file.stat().st_size for file in files)
    check_place(out, transformer if folder is None else folder, num_bytes)
    with new_checkpoint(out, overwrite) as fresh:
        make, told = partial(wan_model, config), partial(progress, "transformer")
        write_model(fresh / "transformer", make, tensors, shard_bytes, told)
        for part, part_of in parts.items():
            copy_part(part_of, fresh / part, partial(progress, part))
        if folder is not None and parts:
            write_index(fresh, "WanPipeline", pipeline_entries(folder, parts))
    made = [("transformer", f"WanTransformer3DModel: the {stream} stream of {source}, {len(tensors)} tensors")]
    made.extend((part, "copied") for part in parts)
    return Conversion(str(source), out, tuple(made), (*extras, *missing), *folder_size(out))


def locate(source: str | Path) -> tuple[Path, Path | None]:
    """The transformer's folder, and the checkpoint's where there is a whole one (checked as if it were loaded)."""
    config_file = Path(source) / "config.json"
    if config_file.exists() and not (Path(source) / INDEX).exists():
        return require_ours(Path(source)), None
    if (Path(source) / "transformer").is_dir() and not (Path(source) / INDEX).exists():
        return require_ours(Path(source) / "transformer"), None
    folder = find_checkpoint(source)
    check_folder(folder)
    return folder / "transformer", folder


def require_ours(folder: Path) -> Path:
    """The folder, if it is that of our transformer."""
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != "Transformer":
        raise UserError(f"checkpoint {folder / 'config.json'}: _class_name: expected Transformer (u4d), got {kind!r}")
    return folder


def slice_stream(
    stored: Mapping[str, StoredTensor], config: TransformerConfig, index: int
) -> tuple[dict[str, PlannedTensor], list[tuple[str, str]]]:
    """One stream of every tensor that Wan has, in Wan's order; (name, why) of the others."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in wan_model(config).state_dict().items()}
    tensors = {}
    for name, shape in shapes.items():
        tensor = stored[name]
        if tensor.shape != (len(STREAMS), *shape):
            raise RuntimeError(f"{name}: expected Wan's shape with one leading stream dimension, got {tensor.shape}")
        tensors[name] = PlannedTensor(DTYPES[tensor.dtype], shape, partial(row, tensor, index))
    others = {name.split(".")[0] for name in stored if name not in shapes}
    return tensors, [(name, WHY.get(name, "Wan has no such part")) for name in sorted(others)]


def row(stored: StoredTensor, index: int) -> Iterator[Tensor]:
    """The values of one stream."""
    yield stored.read_row(index)


def wan_model(config: TransformerConfig) -> Any:
    """diffusers' Wan of the same sizes."""
    from diffusers import WanTransformer3DModel

    sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim", "freq_dim")
    return WanTransformer3DModel(**{name: getattr(config, name) for name in sizes})


def parts_to_copy(folder: Path) -> tuple[dict[str, list[Path]], list[tuple[str, str]]]:
    """Component -> files that a Wan pipeline takes over; (name, why) of those that it does not."""
    components = read_components(folder / INDEX)
    if components["vae"] != WAN_VAE:
        why = f"{components['vae'][1]} is not Wan's, so only transformer/ is made"
        return {}, [("vae", why), ("scheduler", "as the VAE")]
    parts = {"vae": part_files(folder / "vae", WEIGHTS), "scheduler": part_files(folder / "scheduler", None)}
    if "text_encoder" not in components or "tokenizer" not in components:
        return parts, [
            ("text_encoder, tokenizer", "the checkpoint has none; load with text_encoder=None, tokenizer=None")
        ]
    parts["text_encoder"] = part_files(folder / "text_encoder", TEXT_WEIGHTS)
    parts["tokenizer"] = part_files(folder / "tokenizer", None)
    return parts, []


def pipeline_entries(folder: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What `WanPipeline.save_pretrained` writes into `model_index.json`."""
    components = read_components(folder / INDEX)
    text = {name: components[name] if name in parts else [None, None] for name in ("text_encoder", "tokenizer")}
    return {
        "boundary_ratio": None,
        "expand_timesteps": False,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": WAN_VAE,
        "scheduler": components["scheduler"],
        **text,
    }
