"""Checkpoints on disk: diffusers folders, safetensors only."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError

from u4d.checkpoint_files import (
    PICKLES,
    TEXT_WEIGHTS,
    StoredTensor,
    check_fields,
    first_line,
    pickle_error,
    read_json,
    stored_tensors,
    weight_files,
)
from u4d.diffusion.flow import DEFAULT_SHIFT, STREAMS
from u4d.errors import UserError

if TYPE_CHECKING:
    from diffusers import ModelMixin, UniPCMultistepScheduler

    from u4d.model.transformer import Transformer

Loaded = TypeVar("Loaded")
SHIPPED = Path(__file__).parent / "weights"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")  # weights, configurations, tokenizers
INDEX = "model_index.json"
MARKER = "transformer/config.json"  # by which an older checkpoint is known, a transformer alone too
SETTINGS = ("dense_steps", "dense_guidance", "camera_smoothing")  # plain values beside the components
REQUIRED = ("transformer", "vae", "scheduler")
TEXT_PARTS = ("text_encoder", "tokenizer")
LARGE_BYTES = 4e9  # of weights on disk: 1 B parameters in float32, or 2 B in bfloat16


def find_checkpoint(name: str | Path) -> Path:
    """Folder of a shipped preset, of a local checkpoint, or of a hub id's local copy.

    Raises:
        UserError: neither a shipped preset, nor a folder with `model_index.json`, nor a hub id that can be had.
    """
    shipped = sorted(path.name for path in SHIPPED.glob("*") if (path / INDEX).exists())
    if str(name) in shipped:
        return SHIPPED / str(name)
    folder = Path(name)
    if not folder.is_dir():
        if not is_hub_id(name):
            raise UserError(
                f"checkpoint {str(name)!r}: expected a shipped preset ({', '.join(shipped) or 'none here'}), "
                f"a folder with {INDEX}, or a hub id such as 'owner/name'"
            )
        folder = download_checkpoint(str(name))
    if not (folder / INDEX).exists():
        raise UserError(f"checkpoint {folder}: expected a diffusers folder with {INDEX}, found none there")
    return folder


def usual_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """In what a checkpoint's transformer computes: float32 on a CPU if it is small, and else bfloat16."""
    large = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")) > LARGE_BYTES
    return torch.float32 if device.type == "cpu" and not large else torch.bfloat16


def is_hub_id(name: str | Path) -> bool:
    """Whether that looks like 'owner/name' and is no file or folder here."""
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def download_checkpoint(hub_id: str, cached_only: bool = False) -> Path:
    """Local copy of a checkpoint on the hub: safetensors, configurations and tokenizers, never a pickle or code.

    Args:
        hub_id: 'owner/name'.
        cached_only: take what was downloaded before; never ask the network.
    Raises:
        UserError: no such id, no network, or no copy here.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES), local_files_only=cached_only))
    except (OSError, ValueError) as error:
        if cached_only:
            message = f"checkpoint {hub_id}: no such folder here, nor downloaded before: hf download {hub_id}"
        else:
            message = f"checkpoint {hub_id}: no such folder here, nor loaded from the hub: {first_line(error)}"
        raise UserError(message) from error


def save_checkpoint(
    folder: Path,
    transformer: Transformer,
    codec: ModelMixin,
    dtype: torch.dtype,
    *,
    text_folder: Path | None = None,
) -> None:
    """Write a pipeline's folder; an older one is replaced when the new is complete.

    Args:
        folder: where.
        transformer, codec: written in `dtype`; Wan's VAE as it is.
        dtype: of the weights.
        text_folder: another checkpoint, whose text encoder and tokenizer are copied; None writes none.
    """
    from u4d.model.codec import TinyCodec
    from u4d.model.lora import lora_layers
    from u4d.pipeline import Pipeline

    if lora_layers(transformer):
        raise UserError(
            "transformer: expected plain weights, got LoRA adapters over them; merge_lora or save_lora them"
        )
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    # The plain cast: diffusers' own warns about modules that it keeps in float32 when it loads them.
    cast = torch.nn.Module.to
    vae = cast(deepcopy(codec), dtype) if isinstance(codec, TinyCodec) else codec
    pipe = Pipeline(cast(deepcopy(transformer), dtype), vae, new_scheduler())
    pipe.save_pretrained(fresh)
    if text_folder is not None:
        copy_text_parts(text_folder, fresh)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def copy_text_parts(source: Path, target: Path) -> None:
    """Give a new checkpoint another one's text encoder and tokenizer, file by file: UMT5's 11 GB are never loaded."""
    index, theirs = read_json(target / INDEX), read_json(source / INDEX)
    for part in TEXT_PARTS:
        (target / part).mkdir()
        for file in sorted(file for pattern in HUB_FILES for file in (source / part).glob(pattern)):
            shutil.copyfile(file, target / part / file.name)
        index[part] = theirs[part]
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"  # as diffusers does
    (target / INDEX).write_text(text, encoding="utf-8")


def check_new_checkpoint(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless a checkpoint may be put there. Long work, such as a download, calls this before it starts.

    Raises:
        UserError: an older checkpoint without `overwrite`, or somebody else's files.
    """
    from u4d.data.atomic import check_output_folder

    check_output_folder(folder, MARKER, overwrite)


@contextmanager
def new_checkpoint(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder for a new checkpoint, which takes its place when the block ends well (see `new_folder`).

    Raises:
        UserError: as `check_new_checkpoint`, or nothing can be written there.
    """
    from u4d.data.atomic import new_folder

    with new_folder(folder, MARKER, overwrite) as fresh:
        yield fresh


def new_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of our checkpoints, as diffusers describes it."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=DEFAULT_SHIFT, prediction_type="flow_prediction")


def load_components(source: Path, load: Callable[[], Loaded]) -> Loaded:
    """Run diffusers' loader, after the checks that it does not make; whatever is wrong becomes one clear line.

    Raises:
        UserError: see `check_folder`; or files that can't be read.
    """
    check_folder(source)
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"checkpoint {source}: can't be loaded: {first_line(error)}") from error


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint that diffusers would load in part, fill up with random weights, or trust too much.

    Raises:
        UserError: a pickle, code from elsewhere, an unknown configuration field, a damaged file, or tensors that are
            not exactly those of their class. The file and the tensor are named.
    """
    pickles = sorted(path for suffix in PICKLES for path in folder.glob(f"*/*{suffix}"))
    if pickles:
        raise pickle_error(pickles[0])
    index_file = folder / INDEX
    for name, entry in read_components(index_file).items():
        model = model_class(index_file, name, entry)
        if model is not None:
            check_weights(folder / name, model)
        elif name == "text_encoder":
            stored_tensors(folder / name, TEXT_WEIGHTS)


def read_components(index_file: Path) -> dict[str, Any]:
    """Name -> [library, class] of the components that a u4d checkpoint has.

    Raises:
        UserError: no index of ours, or one that lacks what every pipeline needs.
    """
    index = read_json(index_file)
    kind = index.get("_class_name")
    if kind != "Pipeline":
        made = f"; u4d init --from {index_file.parent} makes one of it" if str(kind).startswith("Wan") else ""
        raise UserError(f"checkpoint {index_file}: expected a u4d Pipeline, got {kind!r}{made}")
    components = {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and name not in SETTINGS and entry != [None, None]
    }
    for name in REQUIRED:
        if name not in components:
            raise UserError(f"checkpoint {index_file}: expected a component {name!r}, found none")
    return components


def model_class(index_file: Path, name: str, entry: Any) -> type[ModelMixin] | None:
    """The class of a component with weights to check; None for a scheduler, and for the parts that transformers loads.

    Raises:
        UserError: neither u4d, diffusers nor transformers has such a class.
    """
    from diffusers import ModelMixin, SchedulerMixin

    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if library == "transformers":
        return None
    found = None
    if library == "diffusers" or str(library).startswith("u4d.model."):
        try:
            found = getattr(import_module(str(library)), str(class_name), None)
        except ImportError:
            found = None
    if not isinstance(found, type) or not issubclass(found, (ModelMixin, SchedulerMixin)):
        raise UserError(
            f"checkpoint {index_file}: component {name!r}: expected a class of u4d, diffusers or transformers, "
            f"got {json.dumps(entry)}"
        )
    return found if issubclass(found, ModelMixin) else None


def check_weights(folder: Path, model: type[ModelMixin]) -> dict[str, StoredTensor]:
    """Compare the headers of a model's weight files with the class that its configuration describes.

    Returns:
        its tensors, by name.
    Raises:
        UserError: the configuration or a file can't be read, or a tensor is missing, unknown, or of another shape.
    """
    config_file = folder / "config.json"
    wanted = described_shapes(config_file, read_json(config_file), model)
    found = stored_tensors(folder)
    check_tensors(found, wanted, model.__name__, weight_files(folder)[0])
    return found


def described_shapes(config_file: Path, config: dict[str, Any], model: type[ModelMixin]) -> dict[str, list[int]]:
    """Shapes of the tensors that a model of that configuration has, by name.

    Raises:
        UserError: a field that the class does not know (diffusers alone would ignore it), or a value without sense.
    """
    if model.__module__.startswith("diffusers."):  # our own classes do so themselves
        check_fields(config_file, config, inspect.signature(model).parameters)
    try:
        with torch.device("meta"):
            return {name: list(tensor.shape) for name, tensor in model.from_config(config).state_dict().items()}
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"checkpoint {config_file}: {first_line(error)}") from error


def check_tensors(
    found: Mapping[str, StoredTensor], wanted: Mapping[str, list[int]], class_name: str, expected_in: Path
) -> None:
    """Raise UserError unless exactly the wanted tensors are there; `expected_in` is where a missing one should be."""
    for name, tensor in found.items():
        where, got = f"checkpoint {tensor.file}: tensor {tensor.key!r}", list(tensor.shape)
        if name not in wanted:
            raise UserError(f"{where} is not known to {class_name}")
        shape = wanted[name]
        if got == shape:
            continue
        stacked = class_name == "Transformer" and shape[:1] == [len(STREAMS)]
        if stacked and got[1:] == shape[1:]:
            raise UserError(f"{where}: expected {len(STREAMS)} streams, got {got[0]}")
        made = "; this is Wan's own, of one stream: u4d init makes four of it" if stacked and got == shape[1:] else ""
        raise UserError(f"{where}: expected {shape}, got {got}{made}")
    for name in wanted:
        if name not in found:
            raise UserError(f"checkpoint {expected_in}: tensor {name!r} is missing")
