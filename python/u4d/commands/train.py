"""`u4d train`: run a recipe, or go on with a run that was stopped."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from u4d.commands.arguments import add_device, torch_device, whole_number
from u4d.errors import UserError

SUMMARY = "train a checkpoint by a recipe, resuming a run that was stopped"
INTERRUPTED = "the last saved step is kept: the same command goes on from there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="what to train: see below")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="CHECKPOINT",
        help="fine-tune this checkpoint, with its own codec and statistics: a shipped preset, a folder or a hub id",
    )
    parser.add_argument(
        "--lora",
        type=whole_number(1),
        metavar="RANK",
        help="with --from: freeze the checkpoint and train adapters of this rank (8 to 64 are usual)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(0),
        default=1,
        metavar="N",
        help="processes that render training clips (default 1); 0 renders between the steps",
    )
    add_device(parser)


def epilog() -> str:
    """Recipes and what a run leaves behind."""
    from u4d.train.recipe import RECIPES

    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {(make.__doc__ or '').strip().splitlines()[0]}" for name, make in RECIPES.items()]
    return "\n".join(
        [
            "recipes:",
            *lines,
            "",
            "RUN holds recipe.json, log.jsonl (one line a step), state.pt and checkpoint/ (diffusers layout), or with",
            "--lora adapter/ (peft's layout). Stop it at any time; the same command goes on.",
            "Then: u4d eval --checkpoint RUN/checkpoint, or: u4d complete INPUT -o OUT --lora RUN/adapter",
        ]
    )


def run(args: argparse.Namespace) -> None:
    """Train."""
    from u4d.commands.output import check_run_output
    from u4d.train.recipe import RECIPES, FineTuning

    if args.recipe not in RECIPES:
        raise UserError(f"RECIPE: expected one of {', '.join(RECIPES)}, got {args.recipe!r}")
    if args.lora is not None and args.start is None:
        raise UserError("--lora: expected --from CHECKPOINT with it, since adapters change a model that is there")
    check_run_output(args.out, "recipe.json")
    from u4d.commands.console import quiet_libraries, use_all_cores

    device = torch_device(args.device)
    use_all_cores()
    recipe = RECIPES[args.recipe]()
    if args.start is not None:
        recipe = replace(recipe, start=FineTuning(args.start, args.lora))
    with quiet_libraries():
        from u4d.train.loop import train

        result = train(recipe, args.out, workers=args.workers, device=device)
    if args.lora is None:
        print(f"checkpoint: {result}\nnext: u4d eval --checkpoint {result}")
    else:
        print(f"adapter: {result}\nnext: u4d complete INPUT -o OUT --checkpoint {args.start} --lora {result}")
