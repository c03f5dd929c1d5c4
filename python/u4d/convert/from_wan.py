"""Four streams from Wan2.1: every tensor of the source, once per stream.

Source: the seed, "Initialization"; spec.md section 2.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from u4d import presets
from u4d.checkpoint import SETTINGS, check_new_checkpoint, new_checkpoint, new_scheduler
from u4d.checkpoint_files import TEXT_WEIGHTS, WEIGHTS
from u4d.convert.conversion import SHARD_BYTES, Conversion, Progress, folder_size, no_progress
from u4d.convert.folders import check_place, copy_part, part_files, write_index, write_model
from u4d.convert.shards import PlannedTensor
from u4d.convert.source import TEXT_ENCODER, WanSource, open_source
from u4d.convert.stacking import planned, stack_streams, unchanged
from u4d.convert.starting_values import REFERENCE_FOV_RAD, latent_statistics
from u4d.convert.wan_vae import WanVae, vae_defaults
from u4d.diffusion.flow import STREAMS
from u4d.errors import UserError
from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig

RESULT_DTYPES = (torch.bfloat16, torch.float32)


def init_from_wan(
    source: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    streams: Sequence[str] = STREAMS,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    num_frames: int | None = None,
    image_size: tuple[int, int] | None = None,
    progress: Progress = no_progress,
) -> Conversion:
    """Make a four-stream checkpoint of a Wan2.1 one. It works tensor by tensor: memory does not grow with the model.

    Args:
        source: a hub id, a folder in diffusers' layout, a transformer's folder, or an original safetensors file.
        out_dir: the new folder; it appears whole or not at all.
        dtype: bfloat16 or float32. With bfloat16, what the Transformer keeps in float32 stays so if the source has
            it so, and nothing is ever widened.
        streams: those whose patch embedding and head start as Wan's, "rgb" among them; others start afresh.
        overwrite: replace an older checkpoint.
        shard_bytes: the most bytes of a weight file.
        num_frames, image_size: the clip it will be trained for; by default those of the `wan-1.3b` preset.
        progress: called as progress(part, bytes done, bytes in all).
    Returns:
        what was made and what could not be taken over.
    Raises:
        UserError: not a text-to-video Wan2.1, a damaged one, or a place that can't be written to.
    """
    out = Path(out_dir)
    check_options(dtype, streams, shard_bytes)
    check_new_checkpoint(out, overwrite)
    wan = open_source(source)
    config = result_config(wan, streams, num_frames, image_size)
    tensors = stack_streams(wan.transformer.tensors, config, dtype, streams)
    copies = parts_to_copy(wan)
    check_place(out, wan.place, sum(tensor.num_bytes for tensor in tensors.values()) + size_of(copies))
    with new_checkpoint(out, overwrite) as fresh:
        if wan.text is not None:
            tensors["null_text"] = planned(null_text(wan.text, config.text_dim, dtype), dtype)
        make, told = partial(Transformer, config), partial(progress, "transformer")
        write_model(fresh / "transformer", make, tensors, shard_bytes, told)
        if wan.vae is not None:
            if wan.vae.folder is None:
                write_vae(fresh / "vae", wan.vae, shard_bytes, partial(progress, "vae"))
            for part, files in copies.items():
                copy_part(files, fresh / part, partial(progress, part))
            new_scheduler().save_pretrained(fresh / "scheduler")
            write_index(fresh, "Pipeline", pipeline_entries(wan))
    return Conversion(str(source), out, made(wan, tensors, streams), left_out(wan), *folder_size(out))


def check_options(dtype: torch.dtype, streams: Sequence[str], shard_bytes: int) -> None:
    """Raise UserError for an option that makes no sense."""
    if dtype not in RESULT_DTYPES:
        raise UserError(f"dtype: expected bfloat16 or float32, got {dtype}")
    if isinstance(streams, str) or not set(streams) <= set(STREAMS) or "rgb" not in streams:
        raise UserError(f"streams: expected names among {', '.join(STREAMS)}, rgb one of them, got {streams!r}")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes: expected at least 1, got {shard_bytes}")


def result_config(
    wan: WanSource, streams: Sequence[str], num_frames: int | None, image_size: tuple[int, int] | None
) -> TransformerConfig:
    """Sizes of the source, the clip that is asked for, and the latents' statistics."""
    preset = presets.wan_1_3b().transformer
    fresh = [stream for stream in STREAMS if stream not in streams]
    note = f"; patch embedding and head of {', '.join(fresh)} untrained" if fresh else ""
    image = vae_defaults() if wan.vae is None else wan.vae.config
    mean, std = latent_statistics(image["latents_mean"], image["latents_std"])
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim", "freq_dim")
    return replace(
        preset,
        **{name: wan.transformer.config[name] for name in sizes},
        num_frames=preset.num_frames if num_frames is None else num_frames,
        image_size=preset.image_size if image_size is None else image_size,
        origin=f"Wan2.1 transformer from {wan.name} ({wan.transformer.layout}{note})",
        latents_mean=mean,
        latents_std=std,
        reference_fov_rad=REFERENCE_FOV_RAD,
    )


# --- what is written -------------------------------------------------------------------------------------------------


def null_text(folder: Path, text_dim: int, dtype: torch.dtype) -> Tensor:
    """Embedding `[1,text_dim]` of the empty prompt: one token, its end.

    Raises:
        UserError: the text encoder can't be loaded, or gives another shape.
    """
    from u4d.text_encoder import encode_prompt

    embedding = encode_prompt(folder, "", dtype)
    if tuple(embedding.shape) != (1, text_dim):
        raise UserError(
            f"checkpoint {folder / 'text_encoder'}: the empty prompt: expected one token, its end, of {text_dim} "
            f"numbers, got {list(embedding.shape)}"
        )
    return embedding


def parts_to_copy(wan: WanSource) -> dict[str, list[Path]]:
    """Component -> files that are taken over as they are; none where there is no VAE, and so no pipeline."""
    parts: dict[str, list[Path]] = {}
    if wan.vae is not None and wan.vae.folder is not None:
        parts["vae"] = part_files(wan.vae.folder, WEIGHTS)
    if wan.vae is not None and wan.text is not None:
        parts["text_encoder"] = part_files(wan.text / "text_encoder", TEXT_WEIGHTS)
        parts["tokenizer"] = part_files(wan.text / "tokenizer", None)
    return parts


def size_of(parts: dict[str, list[Path]]) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for files in parts.values() for file in files)


def write_vae(folder: Path, vae: WanVae, shard_bytes: int, progress: Callable[[int, int], None]) -> None:
    """An original release's VAE in diffusers' layout, in its own dtypes."""
    from diffusers import AutoencoderKLWan

    # Exactly the tensors of diffusers' class: wan_vae.py has checked them.
    tensors = {name: unchanged(tensor) for name, tensor in vae.tensors.items()}
    write_model(folder, partial(AutoencoderKLWan, **vae.config), tensors, shard_bytes, progress)


def pipeline_entries(wan: WanSource) -> dict[str, object]:
    """What `Pipeline.save_pretrained` writes into `model_index.json`."""
    from u4d.pipeline import Pipeline

    arguments = inspect.signature(Pipeline).parameters
    return {
        **{name: arguments[name].default for name in SETTINGS},
        "transformer": ["u4d.model.transformer", "Transformer"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": [None, None] if wan.text is None else list(TEXT_ENCODER),
        "tokenizer": [None, None] if wan.text is None else list(wan.tokenizer),
    }


# --- what is told ----------------------------------------------------------------------------------------------------


def made(wan: WanSource, tensors: dict[str, PlannedTensor], streams: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(part, what it is) of all that was written."""
    config = wan.transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    counts = {dtype: sum(tensor.dtype == dtype for tensor in tensors.values()) for dtype in RESULT_DTYPES}
    dtypes = ", ".join(f"{count} tensors {str(dtype)[6:]}" for dtype, count in counts.items() if count)
    ends = " ".join(stream for stream in STREAMS if stream in streams)
    facts = [
        ("transformer", f"{config['num_layers']} layers of width {width}, {len(STREAMS)} streams; {dtypes}"),
        ("patch embedding, head", f"Wan's in {ends}" + ("" if set(streams) == set(STREAMS) else "; others afresh")),
    ]
    if wan.vae is not None:
        facts.append(("vae", "copied" if wan.vae.folder is not None else "the original release's, renamed"))
        if wan.text is not None:
            facts.append(("text_encoder, tokenizer", "copied"))
    if wan.text is not None:
        facts.append(("null text", "the embedding of the empty prompt, stored with the transformer"))
    return tuple(facts)


def left_out(wan: WanSource) -> tuple[tuple[str, str], ...]:
    """(what, why) of all that could not be taken over."""
    facts = list(wan.left_out)
    if wan.text is None:
        facts.append(("null text", "zeros, since there is no text encoder"))
    if wan.vae is None:
        facts.append(("vae", "SOURCE has none, so only transformer/ is made; latent statistics are Wan2.1's"))
        if wan.text is not None:
            facts.append(("text_encoder, tokenizer", "not copied, since there is no VAE to make a pipeline with"))
    positions = wan.transformer.config["rope_max_seq_len"]
    if positions != 1024:
        facts.append(("rope_max_seq_len", f"{positions}; positions have no limit here"))
    return tuple(facts)
