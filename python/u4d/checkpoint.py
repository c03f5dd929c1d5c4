"""Checkpoints on disk: diffusers folders, safetensors only."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from u4d.diffusion.flow import DEFAULT_SHIFT
from u4d.errors import UserError

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from u4d.model.codec import TinyCodec
    from u4d.model.transformer import Transformer

Loaded = TypeVar("Loaded")
SHIPPED = Path(__file__).parent / "weights"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SETTINGS = ("dense_steps", "dense_guidance")  # plain values beside the components
REQUIRED = ("transformer", "vae", "scheduler")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def find_checkpoint(name: str | Path) -> Path | str:
    """Folder of a shipped preset or a local checkpoint; anything that looks like a hub id is returned as it is.

    Raises:
        UserError: neither a shipped preset, nor a folder with `model_index.json`, nor a hub id.
    """
    shipped = sorted(path.name for path in SHIPPED.glob("*") if (path / "model_index.json").exists())
    if str(name) in shipped:
        return SHIPPED / str(name)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise UserError(f"checkpoint {folder}: expected a diffusers folder with model_index.json, found none there")
        return folder
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not folder.exists():
        return name
    raise UserError(
        f"checkpoint {str(name)!r}: expected a shipped preset ({', '.join(shipped) or 'none in this installation'}), "
        "a folder with model_index.json, or a hub id such as 'owner/name'"
    )


def save_checkpoint(folder: Path, transformer: Transformer, codec: TinyCodec, dtype: torch.dtype) -> None:
    """Write a pipeline's folder in `dtype`, replacing an older checkpoint only when the new one is complete."""
    from diffusers import UniPCMultistepScheduler

    from u4d.pipeline import Pipeline

    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=DEFAULT_SHIFT, prediction_type="flow_prediction"
    )
    # The plain cast: diffusers' own warns about modules that it keeps in float32 when it loads them.
    cast = torch.nn.Module.to
    pipe = Pipeline(cast(deepcopy(transformer), dtype), cast(deepcopy(codec), dtype), scheduler)
    pipe.save_pretrained(fresh)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_components(source: Path | str, load: Callable[[], Loaded]) -> Loaded:
    """Run diffusers' loader, after the checks that it does not make; whatever is wrong becomes one clear line.

    Raises:
        UserError: see `check_folder`; or files that can't be read, or no such id on the hub.
    """
    if isinstance(source, Path):
        check_folder(source)
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        where = "can't be loaded" if isinstance(source, Path) else "no such folder here, nor loaded from the hub"
        raise UserError(f"checkpoint {source}: {where}: {first_line(error)}") from error


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint that diffusers would load in part, fill up with random weights, or trust too much.

    Raises:
        UserError: a pickle, code from elsewhere, an unknown configuration field, a damaged file, or tensors that are
            not exactly those of their class. The file and the tensor are named.
    """
    pickles = sorted(path for pattern in PICKLES for path in folder.glob(f"*/{pattern}"))
    if pickles:
        raise UserError(
            f"checkpoint {pickles[0]}: only safetensors are read, since a pickle can run code when it is opened; "
            "load it where you trust it, save it with safetensors.torch.save_file, and delete it here"
        )
    index_file = folder / "model_index.json"
    index = read_json(index_file)
    if index.get("_class_name") != "Pipeline":
        raise UserError(f"checkpoint {index_file}: expected a u4d Pipeline, got {index.get('_class_name')!r}")
    components = {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and name not in SETTINGS and entry != [None, None]
    }
    for name in REQUIRED:
        if name not in components:
            raise UserError(f"checkpoint {index_file}: expected a component {name!r}, found none")
    for name, entry in components.items():
        model = model_class(index_file, name, entry)
        if model is not None:
            check_weights(folder / name, model)


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


def check_weights(folder: Path, model: type[ModelMixin]) -> None:
    """Compare the headers of a model's weight files with the class that its configuration describes.

    Raises:
        UserError: the configuration or a file can't be read, or a tensor is missing, unknown, or of another shape.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    try:
        with torch.device("meta"):
            wanted = {name: list(tensor.shape) for name, tensor in model.from_config(config).state_dict().items()}
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"checkpoint {config_file}: {first_line(error)}") from error
    found = {}
    for file in weight_files(folder):
        for name, shape in stored_shapes(file).items():
            if name not in wanted:
                raise UserError(f"checkpoint {file}: tensor {name!r} is not known to {model.__name__}")
            if shape != wanted[name]:
                raise UserError(f"checkpoint {file}: tensor {name!r}: expected {wanted[name]}, got {shape}")
            found[name] = shape
    for name in wanted:
        if name not in found:
            raise UserError(f"checkpoint {folder / WEIGHTS}: tensor {name!r} is missing")


def weight_files(folder: Path) -> list[Path]:
    """The one weight file of a model, or the shards that its index lists."""
    index_file = folder / f"{WEIGHTS}.index.json"
    if not index_file.exists():
        return [folder / WEIGHTS]
    shards = read_json(index_file).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"checkpoint {index_file}: expected a weight_map, found none")
    return [folder / Path(name).name for name in sorted({str(shard) for shard in shards.values()})]


def stored_shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes in the header of a safetensors file, whose length must fit the header."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            return {name: list(tensors.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {file}: missing, damaged or cut short: {first_line(error)}") from error


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
