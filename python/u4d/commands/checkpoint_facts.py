"""What a checkpoint is, told from its configurations and headers: no weights are read but the null text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u4d.checkpoint import INDEX, SETTINGS, SHIPPED, check_folder, check_weights, download_checkpoint, is_hub_id
from u4d.checkpoint_files import DTYPES, TEXT_WEIGHTS, WEIGHTS, StoredTensor, read_json, weight_files
from u4d.presets import TransformerConfig, read_config

if TYPE_CHECKING:
    from u4d.convert.source import WanSource

Facts = list[tuple[str, str]]


def checkpoint_facts(name: str) -> Facts:
    """Of a shipped preset, a folder, a transformer's folder, an original file, or a hub id that was downloaded before.

    Raises:
        UserError: nothing there, or damaged; what is wrong is named.
    """
    place = SHIPPED / name if (SHIPPED / name / INDEX).exists() else Path(name)
    if is_hub_id(name) and not place.exists():
        place = download_checkpoint(name, cached_only=True)
    if place.is_dir() and kind_of(place, INDEX) == "Pipeline":
        return pipeline_facts(place)
    for folder in (place, place / "transformer"):
        if kind_of(folder, "config.json") == "Transformer":
            alone = "a u4d transformer alone: it makes a pipeline together with a vae/ and a scheduler/"
            return [("kind", alone), *transformer_facts(folder), ("folder", str(folder))]
    from u4d.convert.source import open_source

    return wan_facts(open_source(place), name)


def kind_of(folder: Path, file: str) -> str | None:
    """The class that a folder's index or configuration names; None where there is none."""
    return read_json(folder / file).get("_class_name") if (folder / file).is_file() else None


def pipeline_facts(folder: Path) -> Facts:
    """Of a whole u4d checkpoint, checked as if it were loaded."""
    check_folder(folder)
    index = read_json(folder / INDEX)
    from u4d.pipeline import Pipeline

    defaults = inspect.signature(Pipeline).parameters
    steps, guidance, smoothing = (index.get(name, defaults[name].default) for name in SETTINGS)
    smoothed = f"; predicted camera paths smoothed over {smoothing:g} frames" if smoothing else ""
    text = index.get("text_encoder") or [None, None]
    return [
        ("kind", "a u4d checkpoint"),
        *transformer_facts(folder / "transformer"),
        ("vae", f"{index['vae'][1]}, {size_on_disk(weight_files(folder / 'vae', WEIGHTS))}"),
        (
            "text encoder",
            "none: it takes no prompt"
            if text[1] is None
            else f"{text[1]}, {size_on_disk(weight_files(folder / 'text_encoder', TEXT_WEIGHTS))}",
        ),
        ("recommended", f"where all RGB is observed: steps {steps}, guidance {guidance:g}{smoothed}"),
        ("folder", str(folder)),
    ]


def transformer_facts(folder: Path) -> Facts:
    """Of our transformer."""
    from u4d.diffusion.flow import STREAMS
    from u4d.model.transformer import Transformer

    tensors = check_weights(folder, Transformer)
    config = read_config(TransformerConfig, read_json(folder / "config.json"))
    total = sum(tensor.numel for name, tensor in tensors.items() if name != "null_text")
    # The motion features and the link between the streams are no stream's own.
    beside = sum(tensor.numel for name, tensor in tensors.items() if name.startswith(("motion.", "link.")))
    height, width = config.image_size
    options = [name for name in ("motion_features", "rgb_to_geometry") if getattr(config, name)]
    return [
        ("origin", config.origin or "not told"),
        ("streams", " ".join(STREAMS)),
        ("sizes", sizes_line(vars(config))),
        ("parameters", f"{count(total)}: {count((total - beside) // len(STREAMS))} per stream" + extra(beside)),
        ("dtype", dtypes_line(tensors.values())),
        ("weights", size_on_disk(weight_files(folder))),
        ("clip", f"{config.num_frames} frames of {height}x{width}"),
        *([("options", ", ".join(options))] if options else []),
        *statistics_facts(config),
        ("null text", null_text_line(tensors["null_text"], config.text_length)),
    ]


def statistics_facts(config: TransformerConfig) -> Facts:
    """A line per stream; the empty channels of the rays are left out."""
    from u4d.diffusion.flow import RAY_CHANNELS, STREAMS

    if config.latents_mean is None or config.latents_std is None:
        return [("latents", "no statistics: it is not trained")]
    facts = []
    for stream, means, stds in zip(STREAMS, config.latents_mean, config.latents_std, strict=True):
        channels = RAY_CHANNELS if stream.startswith("ray") else len(means)
        mean, used = sum(means[:channels]) / channels, stds[:channels]
        facts.append((f"latents {stream}", f"mean {mean:.3f}, deviation {min(used):.3f} to {max(used):.3f}"))
    reference = f"field of view {config.reference_fov_rad:.3f} rad"
    return [*facts, ("reference camera", reference), ("ray basis", config.ray_basis)]


def wan_facts(wan: WanSource, name: str) -> Facts:
    """Of a Wan2.1 checkpoint, which u4d does not run as it is."""
    tensors = wan.transformer.tensors.values()
    parts = [part for part, there in (("vae", wan.vae), ("text encoder", wan.text)) if there is not None]
    return [
        ("kind", f"a Wan2.1 checkpoint ({wan.transformer.layout}), of one stream"),
        ("sizes", sizes_line(wan.transformer.config)),
        ("parameters", count(sum(tensor.numel for tensor in tensors))),
        ("dtype", dtypes_line(tensors)),
        ("weights", size_on_disk(sorted({tensor.file for tensor in tensors}))),
        ("with it", ", ".join(parts) or "nothing else"),
        ("next", f"u4d init --from {name} -o OUT makes a u4d checkpoint of it"),
    ]


def sizes_line(config: dict[str, Any]) -> str:
    """Layers, widths and heads."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    return (
        f"{config['num_layers']} layers, hidden {heads * head_dim}, {heads} heads of {head_dim}, "
        f"ffn {config['ffn_dim']}, text {config['text_dim']}"
    )


def dtypes_line(tensors: Iterable[StoredTensor]) -> str:
    """How many tensors there are of each dtype, the most frequent first."""
    found = [tensor.dtype for tensor in tensors]
    names = sorted(set(found), key=lambda name: -found.count(name))
    return ", ".join(
        f"{str(DTYPES.get(name, name)).removeprefix('torch.')} ({found.count(name)} tensors)" for name in names
    )


def null_text_line(tensor: StoredTensor, text_length: int) -> str:
    """Whether an empty prompt has an embedding of its own."""
    stored = "stored" if bool(tensor.read().any()) else "zeros"
    return stored + (f", then {text_length - 1} zero rows" if text_length > 1 else "")


def size_on_disk(files: list[Path]) -> str:
    """Number and size of weight files; an index of shards is not counted."""
    weights = [file for file in files if file.suffix == ".safetensors"]
    size = sum(file.stat().st_size for file in weights)
    amount = f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"
    return f"{len(weights)} file{'s' * (len(weights) > 1)}, {amount}"


def count(number: int) -> str:
    """5675987200 -> "5.676 B"."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def extra(beside: int) -> str:
    """Parameters that belong to no stream."""
    return f", {count(beside)} beside them" if beside else ""
