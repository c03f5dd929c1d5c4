"""Arguments that several verbs share, and the checks of their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from u4d.errors import UserError
from u4d.presets import PRECISIONS, Precision

if TYPE_CHECKING:
    from u4d.pipeline import Pipeline

DEVICES = ("auto", "cpu", "cuda")


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
        return number

    return parse


def number_between(least: float, most: float) -> Callable[[str], float]:
    """An argparse type: numbers from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a number from {least:g} to {most:g}, got {text!r}")
        return number

    return parse


def add_observation(parser: argparse.ArgumentParser) -> None:
    """--observe and its shorthand --task."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--observe",
        metavar="SPEC",
        help="what is given, as modality:frames with modality rgb, depth or camera (default rgb:all)",
    )
    group.add_argument("--task", metavar="NAME", help="a name for a common observation instead of --observe")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Settings of the sampler."""
    parser.add_argument(
        "--steps",
        type=whole_number(1),
        metavar="N",
        help="denoising steps (default 40, or what the checkpoint recommends where all RGB is observed; tiny: 1)",
    )
    parser.add_argument(
        "--guidance",
        type=number_between(0, 100),
        metavar="W",
        help="strength of history guidance (default 2, or as recommended); 1 switches it off and halves the time",
    )
    parser.add_argument(
        "--candidates",
        type=whole_number(1),
        default=1,
        metavar="L",
        help="completions to draw, of which the most consistent is kept (default 1)",
    )
    parser.add_argument(
        "--halving",
        action="store_true",
        help="with --candidates: give up three of four between steps, by their one-step estimates (16 -> 4 -> 1): "
        "about a quarter of the time, and not always the very best (docs/tiny.md)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="the same seed gives the same result (default 0)"
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Long clips, part by part."""
    parser.add_argument(
        "--window",
        type=whole_number(1),
        metavar="N",
        help="complete every frame of a long input, N at a time (at most the checkpoint's; tiny: 18); "
        "the first window must hold what is observed of cameras and depth, since it sets world frame and scale",
    )
    parser.add_argument(
        "--overlap",
        type=whole_number(1),
        metavar="K",
        help="with --window: frames that neighbouring windows share (default 10 of 18 or more, 6 of 10 or more, "
        "else 2); 2, 6, 10, 14, ... waste none",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Which weights, and where they run."""
    parser.add_argument(
        "--checkpoint",
        default="tiny",
        metavar="NAME",
        help="a shipped preset, a folder in diffusers' layout, or a hub id (default tiny)",
    )
    parser.add_argument(
        "--lora", type=Path, metavar="FOLDER", help="adapters of that checkpoint, as 'u4d train --lora' or peft write"
    )
    add_device(parser)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep weights on the CPU and bring each part to the GPU while it works: for models that don't fit whole",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="exact",
        help="fp8: matrix products of linear layers and self-attention in fp8 (fp8-linear: only linear layers), faster "
        "on a Hopper GPU, slower elsewhere; what it costs in quality: docs/tiny.md (default exact)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to run."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default auto: a CUDA GPU where there is one")


def observation_spec(args: argparse.Namespace, default: str) -> str:
    """The spec that --observe or --task names.

    Raises:
        UserError: there is no such task.
    """
    if args.task is None:
        return default if args.observe is None else str(args.observe)
    from u4d.sample.observation import TASKS

    task = TASKS.get(args.task.lower().replace("-", "_"))
    if task is None:
        raise UserError(f"--task: expected one of {', '.join(TASKS)}, got {args.task!r}")
    return task.observe


def existing(path: Path, name: str) -> Path:
    """The path, if something is there.

    Raises:
        UserError: nothing is.
    """
    if not path.exists():
        raise UserError(f"{path}: {name}: no such file or folder")
    return path


def torch_device(device: str) -> str:
    """What --device means on this machine: "cpu" or "cuda".

    Raises:
        UserError: no such device here.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda was asked for, but torch sees no CUDA GPU; see 'u4d info'")
    return device


@dataclass(frozen=True)
class Weights:
    """What `add_checkpoint` asks for: which weights, with what adapters, where they run, and how exactly."""

    checkpoint: str = "tiny"
    lora: Path | None = None
    device: str = "auto"
    offload: bool = False
    precision: Precision = "exact"


def weights_of(args: argparse.Namespace) -> Weights:
    """The arguments of `add_checkpoint`."""
    return Weights(args.checkpoint, args.lora, args.device, args.offload, args.precision)


def load_pipeline(weights: Weights) -> Pipeline:
    """The pipeline on its device; on a CPU it gets all cores that this process may use.

    Raises:
        UserError: no such checkpoint or adapters, damaged ones, or no such device.
    """
    from u4d.commands.console import quiet_libraries, use_all_cores

    device = torch_device(weights.device)
    if weights.offload and device == "cpu":
        raise UserError("--offload: expected a GPU to bring the parts to, got the CPU; leave it out")
    use_all_cores()
    with quiet_libraries():
        import torch

        from u4d.pipeline import Pipeline

        if weights.offload:
            pipe = Pipeline.from_pretrained(weights.checkpoint, device="cpu", dtype=torch.bfloat16)
            pipe.enable_offload(device)
        else:
            pipe = Pipeline.from_pretrained(weights.checkpoint, device=device)
        if weights.lora is not None:
            pipe.load_lora(weights.lora)
        pipe.transformer.set_precision(weights.precision)
        return pipe
