"""`u4d train`: run a recipe, or go on with a run that was stopped; plan, plot and export runs."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from u4d.commands.arguments import add_device, existing, torch_device, whole_number
from u4d.errors import UserError

if TYPE_CHECKING:
    from u4d.train.recipe import Recipe

SUMMARY = "train a checkpoint by a recipe, resuming a run that was stopped"
INTERRUPTED = "the last saved step is kept: the same command goes on from there"
EXAMPLES = """\
examples:
  u4d train tiny_procedural -o runs/tiny
        on one GPU, or on the CPU
  u4d train tiny_procedural -o runs/long --set optim.lr=3e-4 phases.1.steps=20000 data.draws=1
        settings by their names, as recipe.json has them; a wrong name is answered with the nearest right one
  u4d train tiny_procedural -o runs/mine --from tiny --set data.sources.0.kind=scenes data.sources.0.path=my/clips
        fine-tune a checkpoint on a folder of scenes and videos; with --lora 16 by adapters
  u4d train wan_1_3b_mixture --plan --gpus 4
        what it needs of each GPU, and how long it takes
  torchrun --nproc-per-node 4 -m u4d.cli train wan_1_3b_mixture -o runs/wan
        the same command on 4 GPUs; on several machines, each of which sees RUN, start on each one
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m u4d.cli train ...
  u4d train --plot runs/wan
  u4d train --export runs/wan -o wan-trained --step 20000

RUN holds recipe.json (all settings), log.jsonl (one line a step), state/ (what resuming needs), tensorboard/,
validation/ (pictures), codec/ if the run made one, and at last checkpoint/ (diffusers' layout), or with --lora adapter/
(peft's layout). Stop it at any time; the same command goes on, also with another number of processes.
Then: u4d eval --checkpoint RUN/checkpoint, or: u4d complete INPUT -o OUT --lora RUN/adapter"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="what to train: see below")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="RUN", help="the run's folder; with --export the checkpoint's"
    )
    parser.add_argument(
        "--workers",
        type=whole_number(0),
        default=1,
        metavar="N",
        help="processes that make training clips (default 1); 0 makes them between the steps",
    )
    add_device(parser)
    add_settings(parser.add_argument_group("settings of a run"))
    add_other_work(parser.add_argument_group("instead of training"))


def add_settings(group: argparse._ArgumentGroup) -> None:
    """What a recipe leaves open."""
    group.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="change settings of the recipe, such as optim.lr=3e-4 or batch=32",
    )
    group.add_argument(
        "--from",
        dest="start",
        metavar="CHECKPOINT",
        help="fine-tune this checkpoint, with its own codec and statistics: a shipped preset, a folder or a hub id",
    )
    group.add_argument(
        "--lora",
        type=whole_number(1),
        metavar="RANK",
        help="with --from: freeze the checkpoint and train adapters of this rank (8 to 64 are usual)",
    )


def add_other_work(group: argparse._ArgumentGroup) -> None:
    """What can be done with a recipe or a run besides training."""
    one = group.add_mutually_exclusive_group()
    one.add_argument("--plan", action="store_true", help="print the memory and time that RECIPE needs on GPUs")
    one.add_argument(
        "--plot", type=Path, metavar="RUN", help="draw the curves of a run into its folder, or as the PNG of -o"
    )
    one.add_argument("--export", type=Path, metavar="RUN", help="write a checkpoint of a run's saved state to -o")
    group.add_argument("--gpus", type=whole_number(1), metavar="N", help="with --plan: how many (default 1)")
    group.add_argument("--raw", action="store_true", help="with --export: the weights, not their moving average")
    group.add_argument("--step", type=whole_number(1), metavar="N", help="with --export: of this step (default newest)")


def epilog() -> str:
    """Recipes, examples and what a run leaves behind."""
    from u4d.train.recipe import RECIPES

    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {(make.__doc__ or '').strip().splitlines()[0]}" for name, make in RECIPES.items()]
    return "\n".join(["recipes:", *lines, "", EXAMPLES])


def run(args: argparse.Namespace) -> None:
    """Train, or do what was asked for instead."""
    check_combination(args)
    if args.plot is not None:
        from u4d.train.watch.plot import plot_run

        say(f"curves: {plot_run(existing(args.plot, '--plot'), args.out)}")
    elif args.export is not None:
        export(args)
    elif args.plan:
        from u4d.train.cost.plan import format_plan, plan_training

        say(format_plan(plan_training(chosen_recipe(args), args.gpus or 1)))
    else:
        train_recipe(args)


def check_combination(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that do not go together, or are not enough."""
    from u4d.train.recipe import RECIPES

    work = next((name for name in ("plan", "plot", "export") if getattr(args, name)), None)
    for name, of in (("gpus", "plan"), ("raw", "export"), ("step", "export")):
        if getattr(args, name) and work != of:
            raise UserError(f"--{name}: expected --{of} with it, since it belongs to that alone")
    if work in ("plot", "export"):
        for name, given in (("RECIPE", "recipe"), ("--set", "settings"), ("--from", "start"), ("--lora", "lora")):
            if getattr(args, given) is not None:
                raise UserError(f"{name}: --{work} takes a run as it is, so {name} can't go with it; leave it out")
    elif args.recipe not in RECIPES:
        got = "nothing" if args.recipe is None else repr(args.recipe)
        raise UserError(f"RECIPE: expected one of {', '.join(RECIPES)}, got {got}")
    if args.out is None and work in (None, "export"):
        raise UserError(f"-o: expected a folder to write {'the checkpoint' if work else 'the run'} to, got nothing")


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe with the settings that were given; --set has the last word."""
    from u4d.train.recipe import RECIPES, FineTuning
    from u4d.train.settings import change

    recipe = RECIPES[args.recipe]()
    if args.start is not None:
        recipe = replace(recipe, start=FineTuning(args.start, args.lora))
    elif args.lora is not None:
        if recipe.start is None:
            raise UserError("--lora: expected --from CHECKPOINT with it, since adapters change a model that is there")
        recipe = replace(recipe, start=replace(recipe.start, lora_rank=args.lora))
    return change(recipe, args.settings or [])


def train_recipe(args: argparse.Namespace) -> None:
    """Train, and tell what may follow."""
    from u4d.commands.console import quiet_libraries, use_all_cores
    from u4d.commands.output import check_run_output

    recipe = chosen_recipe(args)
    if is_main():  # the others may come when the run has begun
        check_run_output(args.out, "recipe.json")
    device = torch_device(args.device)
    use_all_cores()
    with quiet_libraries():
        from u4d.train.loop import train

        result = train(recipe, args.out, workers=args.workers, device=device)
    if recipe.start is None or recipe.start.lora_rank is None:
        say(f"checkpoint: {result}\nnext: u4d eval --checkpoint {result}")
    else:
        base = recipe.start.checkpoint
        say(f"adapter: {result}\nnext: u4d complete INPUT -o OUT --checkpoint {base} --lora {result}")


def export(args: argparse.Namespace) -> None:
    """Write a checkpoint of a run's saved state."""
    from u4d.commands.console import quiet_libraries

    with quiet_libraries():
        from u4d.train.state.consolidate import consolidate

        result = consolidate(existing(args.export, "--export"), args.out, average=not args.raw, step=args.step)
    say(f"written: {result}\nnext: u4d info {result}")


def is_main() -> bool:
    """Whether this is the process that prints: the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print, once among all processes."""
    if is_main():
        print(text)
