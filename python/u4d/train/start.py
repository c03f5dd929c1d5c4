"""What a run begins with: a fresh codec and model, or those of a checkpoint, all of it or adapters to be trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from u4d.checkpoint import find_checkpoint
from u4d.checkpoint_files import read_json
from u4d.errors import UserError
from u4d.model.codec import TinyCodec
from u4d.model.latents import Statistics
from u4d.model.lora import LoRAConfig, add_lora
from u4d.model.streams import Streams
from u4d.model.transformer import Transformer
from u4d.pipeline import Pipeline
from u4d.presets import CodecConfig, TransformerConfig, read_config
from u4d.train.codec import fit_grey_decoders, measure_statistics, train_codec
from u4d.train.recipe import Recipe

CHECKPOINTS_OWN = ("latents_mean", "latents_std", "reference_fov_rad", "text_length", "origin")  # no sizes


@dataclass(frozen=True)
class Start:
    """A run at its first step.

    Attributes:
        model: on the CPU; with adapters, all other parameters are frozen.
        codec: in float32, not trained any more.
        statistics: the model's latent statistics.
        digest: of the checkpoint's weights, or "" for fresh ones: a run must go on from the very same.
    """

    model: Transformer
    codec: TinyCodec
    statistics: Statistics
    digest: str = ""


def fresh_start(recipe: Recipe, out: Path, progress: bool) -> Start:
    """Codec (kept in `out/codec`), statistics and a model with random weights."""
    codec = prepare_codec(recipe, out, progress)
    statistics, streams = measure_statistics(codec, recipe)
    return Start(build(recipe, codec, statistics, streams), codec, statistics)


def start_from_checkpoint(recipe: Recipe) -> Start:
    """The model, codec and statistics of the recipe's checkpoint. Nothing is written.

    Weights that stay frozen are bfloat16, as training computes with them.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of other sizes than the recipe's preset.
    """
    assert recipe.start is not None
    name, rank = recipe.start.checkpoint, recipe.start.lora_rank
    require_tiny_codec(find_checkpoint(name))
    pipe = Pipeline.from_pretrained(name, device="cpu", dtype=torch.float32 if rank is None else torch.bfloat16)
    assert isinstance(pipe.vae, TinyCodec)
    require_sizes(name, recipe.preset.transformer, read_config(TransformerConfig, pipe.transformer.config))
    if recipe.preset.codec is not None:
        require_sizes(name, recipe.preset.codec, read_config(CodecConfig, pipe.vae.config))
    digest = digest_of(pipe.transformer, pipe.vae)
    model = pipe.transformer.train()
    if rank is not None:
        torch.manual_seed(recipe.seed)
        add_lora(model, LoRAConfig(rank=rank, alpha=rank))
    return Start(model, pipe.vae.float().eval(), pipe.statistics, digest)


def require_tiny_codec(folder: Path) -> None:
    """Raise UserError for a checkpoint with another codec, before its weights are read."""
    index_file = folder / "model_index.json"
    entry = read_json(index_file).get("vae")
    if not isinstance(entry, list) or entry[-1:] != [TinyCodec.__name__]:
        raise UserError(
            f"checkpoint {index_file}: component 'vae': expected a {TinyCodec.__name__}, got {json.dumps(entry)}: "
            "this version trains models with that small codec only"
        )


def require_sizes(name: str, wanted: TransformerConfig | CodecConfig, found: TransformerConfig | CodecConfig) -> None:
    """Raise UserError at the first field in which a checkpoint's sizes differ from the preset's."""
    for field, value in asdict(wanted).items():
        got = getattr(found, field)
        if field not in CHECKPOINTS_OWN and got != value:
            raise UserError(
                f"checkpoint {name}: {field}: expected {value!r} as in the recipe's preset, got {got!r}; "
                "take a recipe of the checkpoint's own sizes"
            )


def digest_of(*modules: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prepare_codec(recipe: Recipe, out: Path, progress: bool) -> TinyCodec:
    """The run's codec: loaded if it was trained before."""
    folder = out / "codec"
    if folder.exists():
        trained: TinyCodec = TinyCodec.from_pretrained(folder).eval()
        return trained
    with tqdm(total=recipe.codec.steps, disable=not progress, unit="step", desc="codec") as bar:

        def report(step: int, values: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix({name: f"{value:.1f}" for name, value in values.items()})

        codec = train_codec(recipe, report)
    codec.save_pretrained(folder)
    return codec


def build(recipe: Recipe, codec: TinyCodec, statistics: Statistics, streams: Streams) -> Transformer:
    """A fresh model that carries its latent statistics."""
    torch.manual_seed(recipe.seed)
    config = replace(
        recipe.preset.transformer,
        latents_mean=tuple(map(tuple, statistics.mean.tolist())),
        latents_std=tuple(map(tuple, statistics.std.tolist())),
        reference_fov_rad=statistics.reference_fov_rad,
    )
    model = Transformer(config)
    if model.motion is not None:
        fit_grey_decoders(model.motion, codec, statistics, streams)
    return model
