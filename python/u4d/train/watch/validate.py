"""What a validation measures: losses at fixed noise, dense completion in one step, and a picture of it.

The clips, their noise and their noise levels are the same in every validation of every run of a recipe, so two numbers
differ by the weights alone. Nothing here touches the random numbers, the mode or the gradients of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from u4d.clips import Clips, join
from u4d.data.footage import rgb_bytes
from u4d.data.procedural import render_clips
from u4d.diffusion.flow import STREAMS, clean_from_velocity, draw_noise, noisy_latents, velocity_target
from u4d.diffusion.losses import group_errors
from u4d.diffusion.patterns import PATTERNS, ConditioningBatch, allowed_patterns, draw_batch
from u4d.geometry.cameras import relative_to_first
from u4d.geometry.depth import clip_scale, valid_depth
from u4d.model.latents import Codec, Statistics, decode_latents, encode_streams
from u4d.model.streams import observed_scale, to_clips, to_streams
from u4d.train.recipe import Recipe
from u4d.train.watch.scores import correlations, depth_errors, direction_errors_deg, motion_components, turn_errors_deg
from u4d.view.colours import colour_depth, disparity_range
from u4d_fast.time_layout import frame_groups

SEED = 20_000_003
RENDER_CHUNK = 8
MIN_MOTION_IN_SCALES = 0.01  # as in u4d.evaluate: who moves less has no direction worth predicting
PICTURED, GAP = 6, 4  # clips in the picture; white pixels between its tiles


@dataclass(frozen=True, eq=False)
class Validation:
    """What `validate` found. NaN where something is not defined.

    Attributes:
        step: optimiser steps that the weights have seen.
        losses: per pattern the loss of each stream's targets; NaN for a stream that is all context.
        metrics: of dense completion (`rgb:all`, one step, no guidance), under the names of `u4d.evaluate`.
        trivial: the same of everything equally far and a camera that stands still.
        correlations: over clips, of predicted and true pitch, yaw, roll, tx, ty, tz from the first to the last frame.
        grid: `[H,W,3]` uint8; a row per clip: input frame, true depth, predicted depth.
    """

    step: int
    losses: dict[str, tuple[float, ...]]
    metrics: dict[str, float]
    trivial: dict[str, float]
    correlations: dict[str, float]
    grid: np.ndarray


@dataclass(frozen=True, eq=False)
class Asked:
    """What the model is asked about some clips; shapes as in `flow_matching_loss`."""

    noisy: Tensor
    times: Tensor
    target: Tensor
    scale: Tensor


@torch.no_grad()
def validate(
    model: nn.Module,
    codec: Codec,
    statistics: Statistics,
    recipe: Recipe,
    step: int,
    device: torch.device | str,
    weights: Tensor | None = None,
) -> Validation:
    """Measure the model on the recipe's validation clips.

    With sharded weights every process calls this, and each gets the same result.

    Args:
        model: latents, times -> velocity; on `device`, like the codec.
        step: optimiser steps done.
        weights: `[4,16]` loss weights of the channels, as in training; None: all alike.
    """
    device = torch.device(device)
    config, count = recipe.preset.transformer, recipe.watch.validation_clips
    clips = fixed_clips(count, config.num_frames, config.image_size)
    chunks = torch.arange(count).split(recipe.compute.micro_batch or count)
    half = recipe.compute.precision == "bf16"

    def velocity(asked: Asked) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            answer: Tensor = model(asked.noisy, asked.times)
        return answer.float()

    def ask(chunk: Tensor, task: ConditioningBatch, seed: int) -> Asked:
        part = clips.map(lambda whole: whole[chunk]).to(device)
        return noisy_clips(part, task, noise_generators(chunk, seed), codec, statistics)

    losses, predicted = {}, []
    with evaluating(model):
        for index in admitted(config.num_frames):
            errors, supervised = [], []
            for chunk in chunks:
                task = fixed_task(index, chunk, config.num_frames)
                asked = ask(chunk, task, 1 + index)
                errors.append(group_errors(velocity(asked), asked.target, weights).cpu())
                supervised.append(task.supervised)
            losses[PATTERNS[index]] = stream_means(torch.cat(errors), torch.cat(supervised))
        for chunk in chunks:
            asked = ask(chunk, dense_task(len(chunk), config.num_frames), 0)
            clean = clean_from_velocity(asked.noisy, velocity(asked), asked.times)
            streams = decode_latents(clean, codec, statistics, config.num_frames)
            predicted.append(to_clips(streams, config.num_frames, asked.scale)[0].to("cpu"))
    return summarise(step, losses, join(predicted), clips)


@lru_cache(maxsize=1)
def fixed_clips(count: int, frames: int, size: tuple[int, int]) -> Clips:
    """The first clips of the split "val" on the CPU, rendered once; cameras relative to the first."""
    starts = range(0, count, RENDER_CHUNK)
    indices = [range(start, min(start + RENDER_CHUNK, count)) for start in starts]
    clips = join([render_clips(chunk, split="val", frames=frames, size=size) for chunk in indices])
    *_, cam_to_world = clips.everything()
    return replace(clips, cam_to_world=relative_to_first(cam_to_world))


def admitted(frames: int) -> list[int]:
    """Indices into PATTERNS of those that fully known clips of this length admit."""
    allowed = allowed_patterns(torch.ones(len(STREAMS), dtype=torch.bool), len(frame_groups(frames)))
    return allowed.nonzero()[:, 0].tolist()


def fixed_task(pattern: int, chunk: Tensor, frames: int) -> ConditioningBatch:
    """Clean context and noise levels of the targets for those clips, the same whichever others are in the chunk."""
    return draw_batch(
        torch.ones(len(chunk), len(STREAMS), dtype=torch.bool),
        len(frame_groups(frames)),
        generator=noise_generators(chunk, -1 - pattern),
        weights={PATTERNS[pattern]: 1.0},
        clean_context_prob=1.0,
        supervise_context=False,
    )


def dense_task(clips: int, frames: int) -> ConditioningBatch:
    """All of RGB is given, all geometry still noise."""
    context = torch.zeros(clips, len(STREAMS), len(frame_groups(frames)), dtype=torch.bool)
    context[:, STREAMS.index("rgb")] = True
    pattern = torch.full((clips,), PATTERNS.index("geometry_dense"))
    return ConditioningBatch(context=context, times=(~context).float(), supervised=~context, pattern=pattern)


def noise_generators(chunk: Tensor, seed: int) -> list[torch.Generator]:
    """One generator per clip number of the chunk."""
    return [torch.Generator().manual_seed(SEED + 1009 * clip + seed) for clip in chunk.tolist()]


def noisy_clips(
    clips: Clips, task: ConditioningBatch, generators: list[torch.Generator], codec: Codec, statistics: Statistics
) -> Asked:
    """Encode clips in the scale that their context gives, and add each group's noise; where t = 1 nothing is left."""
    rgb, *_ = clips.everything()
    device = rgb.device
    scale = observed_scale(clips, task.context, frame_groups(rgb.shape[1])).to(device)
    clean = encode_streams(to_streams(clips, scale, (rgb.shape[-2], rgb.shape[-1])), codec, statistics)
    noise, times = draw_noise(clean.shape, generators, device=device), task.times.to(device)
    return Asked(noisy_latents(clean, noise, times), times, velocity_target(clean, noise), scale)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has the mode that it had, and sharded weights are sharded again."""
    from torch.distributed.fsdp import FSDPModule

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
            if isinstance(module, FSDPModule):  # the root waits for a backward pass that does not come
                module.reshard()


def stream_means(errors: Tensor, supervised: Tensor) -> tuple[float, ...]:
    """Mean error of each stream's supervised groups, `[B,S,F]` both; NaN where there is none."""
    return tuple(((errors * supervised).sum((0, 2)) / supervised.sum((0, 2))).tolist())


def summarise(step: int, losses: dict[str, tuple[float, ...]], predicted: Clips, truth: Clips) -> Validation:
    """Metrics over clips (the direction's median, of all others the mean) and the picture."""
    _, depth, _, cam_to_world = predicted.everything()
    _, true_depth, _, true_path = truth.everything()
    scale, true_scale = scales(depth), scales(true_depth)
    still = torch.eye(4).expand_as(true_path)
    return Validation(
        step,
        losses,
        metrics=metrics(depth, cam_to_world, true_depth, true_path, true_scale),
        trivial=metrics(torch.ones_like(true_depth), still, true_depth, true_path, true_scale),
        correlations=correlations(motion_components(cam_to_world, scale), motion_components(true_path, true_scale)),
        grid=picture_grid(truth, depth),
    )


def metrics(depth: Tensor, path: Tensor, true_depth: Tensor, true_path: Tensor, scale: Tensor) -> dict[str, float]:
    """Depth `[B,N,H,W]` and cam_to_world `[B,N,4,4]` against the truth of that scale `[B]`."""
    abs_rel, delta = depth_errors(depth, true_depth)
    direction = direction_errors_deg(path, true_path, MIN_MOTION_IN_SCALES * scale)
    return {
        "abs_rel": float(abs_rel.mean()),
        "delta_1_25": float(delta.mean()),
        "translation_direction_deg": float(direction.nanquantile(0.5)),
        "rotation_first_to_last_deg": float(turn_errors_deg(path, true_path).mean()),
    }


def scales(depth: Tensor) -> Tensor:
    """Each clip's median depth, `[B,N,H,W]` -> `[B]` float64."""
    return torch.tensor([clip_scale(clip) for clip in depth], dtype=torch.float64)


def picture_grid(truth: Clips, depth: Tensor) -> np.ndarray:
    """The middle frame of the first clips: input, true depth, predicted depth given the true median: `[H,W,3]`."""
    rgb, true_depth, *_ = truth.everything()
    middle = rgb.shape[1] // 2
    rows = []
    for clip in range(min(PICTURED, len(rgb))):
        true, predicted, shown = true_depth[clip], depth[clip], disparity_range(true_depth[clip])
        ratio = true[valid_depth(true)].median() / predicted.median()
        tiles = (
            rgb_bytes(rgb[clip, middle]),
            colour_depth(true[middle], shown),
            colour_depth(predicted[middle] * ratio, shown),
        )
        rows.append(np.concatenate([framed(tile) for tile in tiles], axis=1))
    return np.concatenate(rows, axis=0)


def framed(tile: np.ndarray) -> np.ndarray:
    """A tile with half a gap of white on all sides."""
    return np.pad(tile, ((GAP // 2, GAP // 2), (GAP // 2, GAP // 2), (0, 0)), constant_values=255)
