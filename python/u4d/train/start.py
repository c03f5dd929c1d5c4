"""What a run begins with: a fresh codec and model, or those of a checkpoint, all of it or adapters to be trained."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from u4d.errors import UserError
from u4d.model.codec import TinyCodec
from u4d.model.latents import Statistics
from u4d.model.lora import LoRAConfig, add_lora, lora_layers
from u4d.model.streams import Streams
from u4d.model.transformer import Transformer
from u4d.model.wan_codec import as_codec
from u4d.pipeline import Pipeline
from u4d.presets import CodecConfig, TransformerConfig, read_config
from u4d.train.codec import fit_grey_decoders, measure_statistics, train_codec
from u4d.train.recipe import Recipe
from u4d.train.settings import from_json, to_json
from u4d.train.shard import start_alike
from u4d.train.world import World

if TYPE_CHECKING:
    from diffusers import ModelMixin

STATISTICS = "statistics.json"
CHECKPOINTS_OWN = ("latents_mean", "latents_std", "reference_fov_rad", "text_length", "origin")  # no sizes


@dataclass(frozen=True)
class Start:
    """A run at its first step.

    Attributes:
        model: on the CPU; with adapters, all other parameters are frozen.
        vae: a `TinyCodec` or Wan's VAE, in float32, not trained any more.
        statistics: the model's latent statistics.
        digest: of the checkpoint's weights, or "" for fresh ones: a run must go on from the very same.
        text_folder: the checkpoint's folder, where it has a text encoder; it is read for captions and copied alone.
    """

    model: Transformer
    vae: ModelMixin
    statistics: Statistics
    digest: str = ""
    text_folder: Path | None = None

    def whole_model(self, state: dict[str, Tensor]) -> Transformer:
        """A model of the same kind with these weights, which are not copied."""
        with torch.device("meta"):
            model = Transformer(read_config(TransformerConfig, self.model.config))
            layers = list(lora_layers(self.model).values())
            if layers:
                add_lora(model, layers[0].config)
        model.load_state_dict(state, assign=True)
        return model


def begin_run(recipe: Recipe, out: Path, world: World, progress: bool) -> Start:
    """What the recipe's run begins with, the same in every process. Writes the recipe, and a fresh codec, into `out`.

    Raises:
        UserError: the checkpoint is not there or does not fit, or `out` belongs to another recipe.
    """
    begin = None if recipe.start is None else start_from_checkpoint(recipe)  # refused before anything is written
    claim(out, recipe, world)
    begin = begin or fresh_start(recipe, out, world, progress)
    start_alike(begin.model, world)
    return begin


def claim(out: Path, recipe: Recipe, world: World) -> None:
    """Write the recipe into a new run folder, or check that an old one is the same recipe's."""
    path = out / "recipe.json"
    if path.exists() and not same_run(path.read_text(), recipe):
        raise UserError(f"{path}: this folder holds a run of another recipe; choose a new folder or delete it")
    world.wait()  # all have looked
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(recipe))
    world.wait()


def same_run(text: str, recipe: Recipe) -> bool:
    """Whether that is the recipe. How steps are computed and watched may change while a run goes on."""
    try:
        old = from_json(text)
    except UserError:  # another version's, or no recipe at all
        return False
    return replace(old, compute=recipe.compute, watch=recipe.watch) == recipe


def fresh_start(recipe: Recipe, out: Path, world: World, progress: bool) -> Start:
    """Codec and latent statistics (made by the main process, kept in `out`) and a model with random weights."""
    if world.main:
        prepare_codec(recipe, out, progress)
    world.wait()
    codec = prepare_codec(recipe, out, progress)
    measured, streams = measure_statistics(codec, recipe)
    if world.main:
        keep_statistics(measured, out)
    world.wait()
    statistics = replace(measured, **kept_statistics(out))
    return Start(build(recipe, codec, statistics, streams), codec, statistics)


def keep_statistics(measured: Statistics, out: Path) -> None:
    """Write statistics into a run's folder, once: measured with another number of threads they differ in last bits."""
    path = out / STATISTICS
    if not path.exists():
        fields = {"mean": measured.mean.tolist(), "std": measured.std.tolist()}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**fields, "reference_fov_rad": measured.reference_fov_rad}))
        os.replace(partial, path)


def kept_statistics(out: Path) -> dict[str, Any]:
    """The measured fields of the `Statistics` that a run began with."""
    fields: dict[str, Any] = json.loads((out / STATISTICS).read_text())
    return fields | {name: torch.tensor(fields[name]) for name in ("mean", "std")}


def start_from_checkpoint(recipe: Recipe) -> Start:
    """The model, codec and statistics of the recipe's checkpoint. Nothing is written.

    Weights that stay frozen are bfloat16 where training computes with them so.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of other sizes than the recipe's preset.
    """
    assert recipe.start is not None
    name, rank = recipe.start.checkpoint, recipe.start.lora_rank
    half = rank is not None and recipe.compute.precision == "bf16"
    pipe = Pipeline.from_pretrained(name, device="cpu", dtype=torch.bfloat16 if half else torch.float32)
    require_sizes(name, recipe.preset.transformer, read_config(TransformerConfig, pipe.transformer.config))
    as_codec(pipe.vae)  # refuses variants
    require_codec(name, recipe.preset.codec, pipe.vae)
    digest = digest_of(pipe.transformer, pipe.vae)
    model = pipe.transformer.train()
    if rank is not None:
        torch.manual_seed(recipe.seed)
        add_lora(model, LoRAConfig(rank=rank, alpha=rank))
    return Start(model, pipe.vae.float().eval().requires_grad_(False), pipe.statistics, digest, pipe.text_folder)


def require_codec(name: str, wanted: CodecConfig | None, found: ModelMixin) -> None:
    """Raise UserError unless a checkpoint's codec is the preset's, or the preset asks for Wan's VAE (None)."""
    kind = "AutoencoderKLWan" if wanted is None else "TinyCodec"
    if type(found).__name__ != kind:
        raise UserError(
            f"checkpoint {name}: vae: expected {kind} as in the recipe's preset, got {type(found).__name__}; "
            "take a recipe of the checkpoint's own sizes"
        )
    if wanted is not None:
        require_sizes(name, wanted, read_config(CodecConfig, found.config))


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
