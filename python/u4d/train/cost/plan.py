"""What a recipe needs of its GPUs: memory by accounting, time by model FLOPs and an assumed share of the peak.

Nothing here was measured on a GPU yet. Weights and all that belongs to them are counted exactly; activations are those
of the real forward and backward pass, run on the meta device (`activation_bytes`). Not in the count: CUDA's context,
buffers of NCCL, workspaces of products and convolutions, what the allocator rounds up; `ALLOWANCE` is set aside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from u4d.errors import UserError
from u4d.memory import GB, codec_activations, gigabytes, meta_vae, weight_bytes, yes_no
from u4d.model.latents import Codec
from u4d.model.wan_codec import as_codec
from u4d.presets import Preset, TransformerConfig
from u4d.train.cost.activation_bytes import activation_bytes, parameter_bytes, training_model
from u4d.train.cost.flops import forward_flops, step_flops
from u4d.train.cost.peaks import named_peak
from u4d.train.recipe import ACTIVATIONS, Recipe

__all__ = ["TrainingPlan", "format_plan", "plan_training", "step_flops"]

GPUS = {"H200": 141 * GB, "H100": 80 * GB}
ALLOWANCE = 4 * GB
TERA = 1e12
ASSUMED_MFU = 0.4
BLOCKS_GATHERED = 3  # FSDP2: the one that computes, the next one, and the buffer that it arrives in
BLOCKS_REDUCED = 2  # gradients of a block, and the buffer that they leave in
PIXEL = 4 * 4  # bytes of RGB and depth in float32


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes on each GPU, and FLOPs of a step over all of them; see `plan_training`.

    Attributes:
        micro_batch, micro_batches: clips of a forward, and how many of them a GPU's share of the batch takes.
        weights: trained ones in float32, frozen ones as they are loaded; this GPU's part, as all up to `average`.
        gradients: float32. While micro-batches add up, FSDP2 keeps them whole on each GPU.
        moments: AdamW's two, float32.
        average: the trained weights' moving average, float32.
        gathered: whole blocks, as FSDP2 has them for a moment; 0 on one GPU.
        reduced: gradients of whole blocks on their way to the GPUs that own them; 0 on one GPU.
        codec: weights.
        clips: RGB and depth of a micro-batch in float32, and their copies as images.
        encoding: the codec's activations, before the transformer's.
        activations: the most that a micro-batch's forward and backward pass has alive, by policy.
        flops: model FLOPs of a step, forward and backward, nothing counted twice.
        again: work that is done a second time in the backward pass, by policy, as a share of the model FLOPs.
        encoding_flops: of the codec in a step; no model FLOPs.
        steps: of the run.
    """

    title: str
    gpus: int
    policy: str
    micro_batch: int
    micro_batches: int
    weights: int
    gradients: int
    moments: int
    average: int
    gathered: int
    reduced: int
    codec: int
    clips: int
    encoding: int
    activations: dict[str, int]
    flops: float
    again: dict[str, float]
    encoding_flops: float
    steps: int

    def peak(self, policy: str) -> int:
        """Bytes on a GPU at the worst moment of a step."""
        staying = self.weights + self.gradients + self.moments + self.average + self.codec + self.clips
        return staying + max(self.encoding, self.gathered + self.reduced + self.activations[policy])

    def fits(self, policy: str, memory_bytes: int) -> bool:
        """Whether that and what is not counted go into so much memory."""
        return self.peak(policy) + ALLOWANCE <= memory_bytes

    def seconds(self, mfu: float, peak_flops: float) -> float:
        """Of a step, where the run reaches that share of the GPUs' peak."""
        return self.flops / (self.gpus * peak_flops * mfu)


def plan_training(recipe: Recipe, gpus: int = 1) -> TrainingPlan:
    """Account for a recipe's memory and work on that many GPUs, over which weights are cut evenly.

    Raises:
        UserError: the batch cannot be shared evenly.
    """
    if gpus < 1 or recipe.batch % gpus:
        raise UserError(f"gpus: expected a divisor of the batch of {recipe.batch} clips, got {gpus}")
    config, compute = recipe.preset.transformer, recipe.compute
    share = recipe.batch // gpus
    micro_batch = min(compute.micro_batch or share, share)
    frames = max(max(phase.frames) for phase in recipe.phases)
    rank = None if recipe.start is None else recipe.start.lora_rank
    model = training_model(config, rank)
    blocks = [(parameter_bytes(block), parameter_bytes(block, trained=True)) for block in model.blocks]
    block, trained_block = max(blocks)
    trained = parameter_bytes(model, trained=True)
    root = parameter_bytes(model) - sum(whole for whole, _ in blocks)
    accumulated = trained if micro_batch < share else part(trained, gpus)
    height, width = config.image_size
    return TrainingPlan(
        title=f"{recipe.preset.name}, {recipe.batch} clips a step, of at most {frames} frames of {height}x{width}",
        gpus=gpus,
        policy=compute.activations,
        micro_batch=micro_batch,
        micro_batches=-(-share // micro_batch),
        weights=part(parameter_bytes(model), gpus),
        gradients=accumulated,
        moments=part(2 * trained, gpus),
        average=part(trained, gpus),
        gathered=root + BLOCKS_GATHERED * block if gpus > 1 else 0,
        reduced=BLOCKS_REDUCED * trained_block if gpus > 1 else 0,
        codec=weight_bytes(meta_vae(recipe.preset.codec)),
        clips=2 * micro_batch * frames * height * width * PIXEL,
        encoding=micro_batch * codec_activations(recipe.preset.codec, frames, config.image_size)[0],
        activations={
            policy: activation_bytes(config, frames, micro_batch, policy, compute.precision, rank)
            for policy in ACTIVATIONS
        },
        flops=mean_step_flops(recipe),
        again=work_again(config, frames, adapters=rank is not None),
        encoding_flops=recipe.batch * encoding_flops(recipe.preset, frames),
        steps=recipe.steps,
    )


def part(count: int, gpus: int) -> int:
    """One GPU's bytes of what is cut evenly."""
    return -(-count // gpus)


def mean_step_flops(recipe: Recipe) -> float:
    """Model FLOPs of a step, averaged over the run's phases and clip lengths."""
    adapters = recipe.start is not None and recipe.start.lora_rank is not None
    total = 0.0
    for phase in recipe.phases:
        odds = sum(phase.frames.values())
        for frames, weight in phase.frames.items():
            flops = step_flops(recipe.preset.transformer, frames, recipe.batch, adapters=adapters)
            total += phase.steps * weight / odds * flops
    return total / recipe.steps


def work_again(config: TransformerConfig, frames: int, adapters: bool) -> dict[str, float]:
    """What the backward pass computes again, by policy, as a share of the model FLOPs."""
    linear, attention = forward_flops(config, frames)
    whole = step_flops(config, frames, 1, adapters=adapters)
    return {"all": 0.0, "attention": linear / whole, "none": (linear + attention) / whole}


def encoding_flops(preset: Preset, frames: int) -> float:
    """FLOPs of encoding one clip's RGB and depth; depth goes RGB's way."""
    codec: Codec = as_codec(meta_vae(preset.codec))
    clip = torch.empty(1, frames, 3, *preset.transformer.image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        codec.encode(clip, "rgb")
    return 2 * float(counted.get_total_flops())


PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "AdamW's two moments",
    "average": "moving average of the weights",
    "gathered": "whole blocks, gathered to compute with",
    "reduced": "gradients of whole blocks, on their way",
    "codec": "weights of the codec",
    "clips": "clips of a micro-batch",
    "encoding": "activations of the codec, at another time than those below",
}
POLICIES = {"all": "all kept", "attention": "attention kept", "none": "nothing kept"}


def format_plan(plan: TrainingPlan, mfu: float = ASSUMED_MFU) -> str:
    """The plan as two Markdown tables, memory by part and by policy, and the time at an assumed MFU."""
    head = f"{plan.title}; GPUs: {plan.gpus}, clips of each: {plan.micro_batches} times {plan.micro_batch}"
    parts = ["| part | GB per GPU |", "| --- | ---: |"]
    parts += [f"| {words} | {gigabytes(getattr(plan, name))} |" for name, words in PARTS.items()]
    rows = [
        f"| for the backward pass | activations, GB | peak, GB | {' | '.join(f'fits {gpu}' for gpu in GPUS)} | again |",
        "| --- | ---: | ---: |" + " --- |" * len(GPUS) + " ---: |",
    ]
    for policy, words in POLICIES.items():
        fits = " | ".join(yes_no(plan.fits(policy, memory)) for memory in GPUS.values())
        name = f"{words} (`{policy}`{', the recipe' if policy == plan.policy else ''})"
        sizes = f"{gigabytes(plan.activations[policy])} | {gigabytes(plan.peak(policy))}"
        rows.append(f"| {name} | {sizes} | {fits} | {plan.again[policy]:.0%} |")
    return "\n".join([head, "", *parts, "", *rows, "", *notes(plan, mfu)])


def notes(plan: TrainingPlan, mfu: float) -> list[str]:
    """What the tables mean, and the time."""
    lines = [
        f"fits: with {ALLOWANCE / GB:g} GB set aside for what is not counted",
        "activations: without torch.compile, which keeps less",
        "again: what the backward pass computes a second time, as a share of the model FLOPs",
        f"a step: {plan.flops / TERA:.4g} TFLOP (model FLOPs, forward and backward)",
        f"encoding its clips: {plan.encoding_flops / TERA:.3g} TFLOP in float32, no model FLOPs",
        "MFU = model FLOPs / (seconds x GPUs x peak)",
    ]
    for gpu in GPUS:
        peak = named_peak(gpu)
        assert peak is not None
        seconds = plan.seconds(mfu, peak)
        lines.append(
            f"{plan.gpus} x {gpu} (peak {peak / TERA:g} TFLOP/s) at {mfu:.0%} MFU, an assumption: {1 / seconds:.3g} "
            f"steps/s, {plan.steps:,} steps in {in_words(plan.steps * seconds)}"
        )
    return lines


def in_words(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
