"""A training step: micro-batches, gradients, clipping, AdamW and the moving average, by what is kept for the backward.

    python benchmarks/bench_training.py [--recipe tiny_procedural wan_1_3b_mixture] [--batch N] [--micro-batch N]
                                        [--layers N] [--compile] [--device cpu|cuda] [--threads N] [--rounds N]
                                        [--seconds N] [--save]

Clips are random and at hand, so making and waiting for them is left out; encoding them is in, and timed by itself as
well. One model serves all versions: at a learning rate of zero every step finds the same weights, so their losses must
agree, or nothing is timed. TFLOP/s and the share of the peak (mfu) are model FLOPs (u4d.train.cost.flops): what is
computed again, and encoding, do not count. The recipe's checkpoint is not needed: weights are random.

Weights, gradients, AdamW's moments and the average of wan-1.3b are 114 GB. A GPU with less gets as many of its layers
as fit, and the case says how many. A policy that does not fit is named among what was not measured.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import harness
import torch
from random_system import random_codec, unit_statistics
from torch import Tensor

from u4d.clips import Clips
from u4d.errors import UserError
from u4d.model.transformer import Transformer
from u4d.train.activations import compile_blocks, keep_activations
from u4d.train.codec import channel_weights
from u4d.train.cost.activation_bytes import parameter_bytes, training_model
from u4d.train.cost.flops import step_flops
from u4d.train.cost.peaks import peak_flops
from u4d.train.data.samples import Samples, TrainingClips, draw_samples, places_of
from u4d.train.loop import accumulate_gradients, make_optimizer, place_models
from u4d.train.recipe import ACTIVATIONS, RECIPES, Recipe
from u4d.train.shard import clip_gradients, update_average
from u4d.train.step import clean_latents
from u4d.train.world import World

TOLERANCE = 2e-2  # bfloat16, other kernels for other policies
DEFAULT_RECIPES = {"cpu": ("tiny_procedural",), "cuda": ("wan_1_3b_mixture", "tiny_procedural")}
BATCHES = {"wan_1_3b_mixture": 4}  # one GPU's share of the recipe's 16 on four
BATCH = {"cpu": 8, "cuda": 256}
COPIES = 5  # of the weights in float32: themselves, gradients, AdamW's two moments, the average
ROOM_BYTES = 15e9  # for activations where attention's results are kept, the codec, and what nobody counts
COMPILE_SECONDS = 60.0  # compiled only if --seconds leaves so much


def random_clips(recipe: Recipe) -> TrainingClips:
    """Clips of the recipe's size with everything known."""
    config, batch = recipe.preset.transformer, recipe.batch
    height, width = config.image_size
    random = torch.Generator().manual_seed(0)
    shape = (batch, config.num_frames)
    intrinsics = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
    cam_to_world = torch.eye(4).repeat(*shape, 1, 1)
    cam_to_world[..., 0, 3] = torch.linspace(0, 1, config.num_frames)
    clips = Clips(
        rgb=torch.rand(*shape, 3, height, width, generator=random),
        depth=1 + torch.rand(*shape, height, width, generator=random),
        intrinsics=intrinsics.repeat(*shape, 1, 1),
        cam_to_world=cam_to_world,
    )
    return TrainingClips(clips, torch.ones(batch, 4, dtype=torch.bool), torch.arange(batch))


class Training:
    """A model in training whose weights stay as they are, and the samples of one step."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        torch.manual_seed(0)
        self.recipe, self.world = recipe, world
        last = recipe.steps - 1  # all five patterns
        clips = random_clips(recipe)
        self.samples: Samples = draw_samples(recipe, last, places_of(recipe.batch, world), clips, world.device)
        self.codec, self.statistics = random_codec(recipe.preset, str(world.device)), unit_statistics(recipe.preset)
        self.weights = channel_weights(self.codec, self.statistics).to(world.device)
        with world.device:  # drawing 23 GB of weights takes minutes on a CPU
            model = Transformer(recipe.preset.transformer)
        self.model, self.average = place_models(model, recipe, world)
        self.optimizer = make_optimizer(self.model, recipe.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def step(self, policy: str) -> Tensor:
        """A whole step; returns the loss of each stream."""
        keep_activations(self.model, policy)
        recipe = replace(self.recipe, compute=replace(self.recipe.compute, activations=policy))
        loss = accumulate_gradients(
            self.model, self.codec, self.statistics, self.samples, self.weights, recipe, self.world
        )
        clip_gradients(self.model, recipe.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_average(self.average, self.model, recipe.optim.ema)
        return loss

    def encode(self) -> None:
        """The codec's share of a step."""
        for micro_batch in self.samples.split(self.recipe.compute.micro_batch):
            clean_latents(micro_batch, self.codec, self.statistics, self.world.device)

    def clean_up(self) -> None:
        """Give back what a step that failed has left."""
        self.optimizer.zero_grad(set_to_none=True)
        free_memory()


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class Bench:
    """Rows, and what could not be measured, as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows, self.skipped = options, list[harness.Row](), dict[str, str]()

    def run(self, name: str) -> None:
        """One recipe."""
        recipe = recipe_for(name, self.options)
        training = Training(recipe, World(torch.device(self.options.device)))
        layers, whole = recipe.preset.transformer.num_layers, RECIPES[name]().preset.transformer.num_layers
        part = f", {layers} of {whole} layers" if layers < whole else ""
        micro = recipe.compute.micro_batch or recipe.batch
        case = f"{name} x {recipe.batch} in {micro}s, {training.samples.frames} frames{part}"
        times = harness.measure({"encode": training.encode}, self.options.device, self.options.rounds, warmup=1)
        self.add(harness.row(case, "encoding the clips", times["encode"]))
        self.policies(training, case, "")
        if not self.options.compile:
            return
        if harness.time_left() < COMPILE_SECONDS:
            self.skipped[f"{name}, compiled"] = f"{harness.time_left():.0f} s were left, too few to compile in"
            return
        compile_blocks(training.model)
        self.policies(training, case, ", compiled")

    def policies(self, training: Training, case: str, how: str) -> None:
        """A row for every policy that can run and agrees with the others."""
        recipe, device = training.recipe, self.options.device
        flops = step_flops(recipe.preset.transformer, training.samples.frames, recipe.batch)
        peak = peak_flops(device)
        memory = dict(self.tried(training, how))
        steps = {policy: partial(training.step, policy) for policy in memory}
        times = harness.measure(steps, device, self.options.rounds, warmup=1)
        for policy in sorted(steps, key=ACTIVATIONS.index):
            rate = flops / (statistics.median(times[policy]) * 1e-3)
            measured = {"clips_per_s": recipe.batch * rate / flops, "tflop_per_s": rate / 1e12}
            measured |= {"mfu": rate / peak} if peak else {}
            self.add(harness.row(case, f"kept: {policy}{how}", times[policy], **measured, **memory[policy]))

    def tried(self, training: Training, how: str) -> Iterator[tuple[str, dict[str, float | str]]]:
        """Policies that work, with the memory that a step takes; the leanest first, since it leaves room to recover."""
        expected: Tensor | None = None
        for policy in reversed(ACTIVATIONS):
            notes: dict[str, float | str] = {}
            try:
                with harness.peak_memory(self.options.device, notes):
                    loss = training.step(policy)
                expected = loss if expected is None else expected
                harness.check_close((expected,), (loss,), TOLERANCE, policy)
            except (Exception, SystemExit) as error:  # what one policy can't do must not cost the others their times
                self.skipped[f"kept: {policy}{how}"] = harness.reason_of(error)
            else:
                yield policy, notes
                continue
            training.clean_up()  # outside, where the error no longer holds what it failed with

    def add(self, row: harness.Row) -> None:
        self.rows.append(row)
        harness.keep("training", self.rows, self.options, self.skipped)


def recipe_for(name: str, options: argparse.Namespace) -> Recipe:
    """The recipe with the batch and the layers that were asked for, or that fit."""
    recipe = RECIPES[name]()
    config = recipe.preset.transformer
    micro_batch = recipe.compute.micro_batch if options.micro_batch is None else options.micro_batch
    config = replace(config, num_layers=options.layers or layers_that_fit(recipe, options.device))
    return replace(
        recipe,
        preset=replace(recipe.preset, transformer=config),
        batch=options.batch or BATCHES.get(name, BATCH[options.device]),
        compute=replace(recipe.compute, micro_batch=micro_batch, compile=False),
        start=None,
    )


def layers_that_fit(recipe: Recipe, device: str) -> int:
    """As many of the recipe's layers as a GPU has memory for; all on a CPU.

    Raises:
        UserError: not even one.
    """
    config = recipe.preset.transformer
    if device != "cuda":
        return config.num_layers
    model = training_model(config)
    block = parameter_bytes(model.blocks[0])
    ends = parameter_bytes(model) - config.num_layers * block
    free = torch.cuda.get_device_properties(0).total_memory - ROOM_BYTES
    layers = min(config.num_layers, int((free / COPIES - ends) / block))
    if layers < 1:
        raise UserError(f"{recipe.preset.name}: expected memory for one layer at least; give it another GPU")
    return layers


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=5)
    parser.add_argument("--recipe", choices=sorted(RECIPES), nargs="+", help="by default tiny's, on a GPU also wan's")
    parser.add_argument("--batch", type=int, help="clips of a step; by default 4 for wan, else 8, on a GPU 256")
    parser.add_argument("--micro-batch", type=int, help="clips of a forward, 0 for all; by default the recipe's")
    parser.add_argument("--layers", type=int, help="of the model; by default all, or as many as the GPU has memory for")
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    for name in options.recipe or DEFAULT_RECIPES[options.device]:
        try:
            bench.run(name)
        except Exception as error:  # what one recipe can't do must not cost the other its times
            bench.skipped[name] = harness.reason_of(error)
            print(f"  {name}: left out: {bench.skipped[name]}", flush=True)
        free_memory()
    harness.show("training", bench.rows, options, bench.skipped)


if __name__ == "__main__":
    main()
