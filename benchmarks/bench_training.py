"""A training step: micro-batches, gradients, clipping, AdamW and the moving average, by what is kept for the backward.

    python benchmarks/bench_training.py [--recipe tiny_procedural] [--batch 8] [--micro-batch 0] [--compile]
                                        [--device cpu|cuda] [--threads N] [--rounds N] [--save]

Clips are random and at hand, so making and waiting for them is left out; encoding them is in. The versions' losses
must agree before anything is timed. TFLOP/s are model FLOPs (u4d.train.cost.flops): what is computed again does not
count. The recipe's checkpoint is not needed: weights are random, the codec is the preset's own.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace

import harness
import torch
from torch import Tensor

from u4d.clips import Clips
from u4d.errors import UserError
from u4d.model.codec import TinyCodec
from u4d.model.latents import Statistics
from u4d.model.transformer import Transformer
from u4d.train.codec import channel_weights
from u4d.train.cost.flops import step_flops
from u4d.train.data.samples import Samples, TrainingClips, draw_samples, places_of
from u4d.train.loop import accumulate_gradients, make_optimizer, place_models
from u4d.train.recipe import ACTIVATIONS, RECIPES, Recipe
from u4d.train.shard import clip_gradients, update_average
from u4d.train.world import World

TOLERANCE = 2e-2  # bfloat16, other kernels for other policies


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


class Step:
    """One version of the step, with weights of its own."""

    def __init__(self, recipe: Recipe, samples: Samples, world: World) -> None:
        if recipe.preset.codec is None:
            raise UserError(f"--recipe: expected one whose preset has a codec of its own, got {recipe.preset.name}")
        torch.manual_seed(0)
        self.recipe, self.samples, self.world = recipe, samples, world
        self.codec = TinyCodec(**asdict(recipe.preset.codec)).to(world.device).eval()
        self.statistics = Statistics(torch.zeros(4, 16), torch.ones(4, 16), recipe.preset.transformer.reference_fov_rad)
        self.weights = channel_weights(self.codec, self.statistics).to(world.device)
        self.model, self.average = place_models(Transformer(recipe.preset.transformer), recipe, world)
        self.optimizer = make_optimizer(self.model, recipe.optim)

    def losses(self) -> Tensor:
        """Gradients, and the loss of each stream."""
        return accumulate_gradients(
            self.model, self.codec, self.statistics, self.samples, self.weights, self.recipe, self.world
        )

    def __call__(self) -> None:
        self.losses()
        clip_gradients(self.model, self.recipe.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_average(self.average, self.model, self.recipe.optim.ema)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.set_defaults(rounds=5)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="tiny_procedural")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step")
    parser.add_argument("--micro-batch", type=int, default=0, help="clips of a forward; 0 for all")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.recipe]()
    world = World(torch.device(options.device))
    compute = replace(recipe.compute, micro_batch=options.micro_batch, compile=options.compile)
    recipe = replace(recipe, batch=options.batch, compute=compute)
    last = recipe.steps - 1  # all five patterns
    samples = draw_samples(recipe, last, places_of(recipe.batch, world), random_clips(recipe), world.device)
    versions = {
        policy: Step(replace(recipe, compute=replace(compute, activations=policy)), samples, world)
        for policy in ACTIVATIONS
    }
    first = versions["all"].losses()
    for policy, step in versions.items():
        harness.check_close((first,), (step.losses(),), TOLERANCE, policy)
        step.optimizer.zero_grad(set_to_none=True)
    times = harness.measure(versions, options.device, options.rounds, warmup=1)
    flops = step_flops(recipe.preset.transformer, samples.frames, recipe.batch)
    case = f"{options.recipe} x {recipe.batch}, {samples.frames} frames" + (", compiled" if options.compile else "")
    rows = []
    for policy in versions:
        seconds = statistics.median(times[policy]) * 1e-3
        measured = {"clips_per_s": recipe.batch / seconds, "tflop_per_s": flops / seconds / 1e12}
        rows.append(harness.row(case, f"kept: {policy}", times[policy], **measured))
    harness.show("training", rows, options)


if __name__ == "__main__":
    main()
