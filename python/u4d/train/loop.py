"""The training loop. It reads top to bottom: clips, samples, gradients, step, average, log, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from u4d.checkpoint import save_checkpoint
from u4d.model.latents import Codec, Statistics
from u4d.model.lora_folder import save_lora
from u4d.model.transformer import Transformer
from u4d.model.wan_codec import as_codec
from u4d.train.activations import compile_blocks, efficient_attention, keep_activations
from u4d.train.codec import channel_weights
from u4d.train.cost.flops import step_flops
from u4d.train.data.captions import Captions, prepare_captions
from u4d.train.data.clips import ClipCounter, batches, one_ahead
from u4d.train.data.samples import Samples, TrainingClips, draw_samples, places_of
from u4d.train.data.sources import Sources, open_sources
from u4d.train.recipe import Optim, Recipe
from u4d.train.shard import clip_gradients, full_state, shard, synchronise_gradients, update_average
from u4d.train.start import Start, begin_run
from u4d.train.state.states import Parts, States
from u4d.train.step import micro_batch_loss
from u4d.train.watch.finite import require_finite
from u4d.train.watch.validate import validate
from u4d.train.watch.watch import StepRecord, Watch, peak_flops
from u4d.train.world import World, start_world


def train(
    recipe: Recipe, out: Path, *, workers: int = 1, device: str | torch.device = "cpu", progress: bool = True
) -> Path:
    """Train codec and transformer, or what the recipe wants of a checkpoint, resuming whatever `out` already holds.

    Under torchrun all its processes call this; they share the batch and the weights.

    Args:
        recipe: what to train.
        out: run folder: recipe.json, log.jsonl, state/, validation/, tensorboard/, and in the end checkpoint/ (and
            codec/, if new) or adapter/.
        workers: processes that make clips, for each process that trains; 0 makes them between the steps.
        device: where the transformer is trained; codec and statistics are made on the CPU.
        progress: show bars.
    Returns:
        the checkpoint folder (diffusers layout, EMA weights), or the adapter's (peft's layout, EMA adapters).
    Raises:
        UserError: `out` belongs to another recipe, its checkpoint is not there or does not fit, the batch can't be
            shared out, too many clips can't be read, or the loss is not finite.
    """
    with start_world(device) as world:
        places, sources = places_of(recipe.batch, world), open_sources(recipe)
        begin = begin_run(recipe, out, world, progress)
        captions = captions_of(begin, sources, world, progress)
        model, average = place_models(begin.model, recipe, world)
        codec, statistics = as_codec(begin.vae.to(world.device)), begin.statistics
        weights = channel_weights(codec, statistics).to(world.device)
        parts = Parts(model, average, make_optimizer(model, recipe.optim))
        with States(out / "state", recipe.watch.keep, world, identity(begin, captions)) as states:
            first, counter = states.restore(parts), ClipCounter(recipe.data.most_bad)
            clips = batches(recipe, sources, places, first, workers, counter)
            drawn = samples_of(recipe, places, first, clips, world.device, captions)
            with watch_run(recipe, out, world, first, progress) as watch:
                for step in range(first, recipe.steps):
                    began = time.perf_counter()
                    samples = next(drawn)
                    waited = time.perf_counter() - began
                    rate = set_learning_rate(parts.optimizer, recipe, step)
                    loss = accumulate_gradients(model, codec, statistics, samples, weights, recipe, world)
                    norm = clip_gradients(model, recipe.optim.clip)
                    require_finite(loss, norm, step, samples, out, world)
                    parts.optimizer.step()
                    parts.optimizer.zero_grad(set_to_none=True)
                    update_average(average, model, min(recipe.optim.ema, (step + 1) / (step + 10)))
                    bad = int(world.sum(torch.tensor(float(counter.bad), device=world.device)))
                    seconds = time.perf_counter() - began
                    watch.step(record_of(recipe, step, samples.frames, loss, norm, rate, seconds, waited, bad))
                    if recipe.watch.validate_every and (step + 1) % recipe.watch.validate_every == 0:
                        watch.validation(validate(average, codec, statistics, recipe, step + 1, world.device, weights))
                    if (step + 1) % recipe.watch.save_every == 0 or step + 1 == recipe.steps:
                        states.save(step + 1, parts)
        return save_result(recipe, out, begin, average, world)


def place_models(model: Transformer, recipe: Recipe, world: World) -> tuple[Transformer, Transformer]:
    """The model to be trained and its average, both on the device and cut over the processes alike."""
    average = copy_to_average(model)
    keep_activations(model, recipe.compute.activations)
    if recipe.compute.compile:
        compile_blocks(model)
    shard(model, world)
    shard(average, world)
    return model, average


def captions_of(begin: Start, sources: Sources, world: World, progress: bool) -> Captions | None:
    """Embeddings of all captions of the sources, by the start checkpoint's encoder; None where there is nothing."""
    config = begin.model.config
    return prepare_captions(
        sources.clips, begin.text_folder, config.text_length, config.text_dim, world, progress and world.main
    )


def identity(begin: Start, captions: Captions | None) -> dict[str, str]:
    """What a run must have in common with the one that it goes on from, besides its recipe."""
    return {"checkpoint": begin.digest, **({} if captions is None else {"text encoder": captions.encoder})}


def samples_of(
    recipe: Recipe,
    places: range,
    first: int,
    clips: Iterator[TrainingClips],
    device: torch.device,
    captions: Captions | None,
) -> Iterator[Samples]:
    """The samples of steps first, first + 1, ...; beside a GPU the next one's are drawn while it works."""
    drawn = (draw_samples(recipe, step, places, batch, device, captions) for step, batch in enumerate(clips, first))
    return one_ahead(drawn) if device.type == "cuda" else drawn


def copy_to_average(model: Transformer) -> Transformer:
    """A copy whose trained parameters are its own; frozen ones are shared, since they may be most of the memory."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    average = deepcopy(model, shared)
    average.eval().requires_grad_(False)
    return average


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over what is trained; weight decay on matrices only."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decays = {name for name, parameter in trained.items() if parameter.ndim >= 3 and "scale_shift" not in name}
    matrices = [parameter for name, parameter in trained.items() if name in decays]
    others = [parameter for name, parameter in trained.items() if name not in decays]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, linear decay to zero at the end. Returns the rate of this step."""
    optim, steps = recipe.optim, recipe.steps
    warm = (step + 1) / optim.warmup
    left = (steps - step) / max(1, round(optim.decay * steps))
    rate = optim.lr * min(1.0, warm, left)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def accumulate_gradients(
    model: Transformer,
    codec: Codec,
    statistics: Statistics,
    samples: Samples,
    weights: Tensor,
    recipe: Recipe,
    world: World,
) -> Tensor:
    """Gradients of the global batch's loss, from this process's samples and all others'.

    Returns:
        `[4]`, the global batch's loss of each stream.
    """
    counts = world.sum(samples.group_counts.to(world.device))
    loss = torch.zeros_like(counts)
    compute = recipe.compute
    micro_batches = samples.split(compute.micro_batch)
    for micro_batch in micro_batches:
        synchronise_gradients(model, micro_batch is micro_batches[-1])
        with efficient_attention(world.device, compute.activations):
            part = micro_batch_loss(model, codec, statistics, micro_batch, counts, weights, compute.precision)
            part.total.backward()
        loss += part.per_stream.detach()
    return world.sum(loss)


def watch_run(recipe: Recipe, out: Path, world: World, first: int, progress: bool) -> Watch:
    """The run's log, bar and events."""
    peak = peak_flops(world.device)
    return Watch(
        out,
        first,
        recipe.steps,
        main=world.main,
        progress=progress and world.main,
        peak_flops=None if peak is None else peak * world.size,
    )


def record_of(
    recipe: Recipe,
    step: int,
    frames: int,
    loss: Tensor,
    norm: Tensor,
    rate: float,
    seconds: float,
    waited: float,
    bad_clips: int,
) -> StepRecord:
    """What is told of a step."""
    return StepRecord(
        step=step,
        loss=tuple(loss.tolist()),
        total=float(loss.mean()),
        grad_norm=float(norm),
        lr=rate,
        seconds=seconds,
        data_wait=waited,
        clips=recipe.batch,
        flops=step_flops(recipe.preset.transformer, frames, recipe.batch, adapters=trains_adapters(recipe)),
        bad_clips=bad_clips,
    )


def trains_adapters(recipe: Recipe) -> bool:
    """Whether adapters are trained, and nothing else."""
    return recipe.start is not None and recipe.start.lora_rank is not None


def save_result(recipe: Recipe, out: Path, begin: Start, average: Transformer, world: World) -> Path:
    """Write the averaged checkpoint or adapter; weights in parts are gathered by the main process."""
    folder = out / ("adapter" if trains_adapters(recipe) else "checkpoint")
    if world.size > 1:
        state = full_state(average, world)
        average = begin.whole_model(state) if world.main else average
    if world.main and recipe.start is not None and trains_adapters(recipe):
        save_lora(average, folder, base=recipe.start.checkpoint)
    elif world.main:
        save_checkpoint(folder, average, begin.vae, torch.bfloat16, text_folder=begin.text_folder)
    world.wait()
    return folder
