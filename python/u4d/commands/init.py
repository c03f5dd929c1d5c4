"""`u4d init`: a four-stream checkpoint from Wan2.1, or a Wan checkpoint back out of one."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from u4d.commands.arguments import whole_number
from u4d.commands.console import Bars, format_facts, quiet_libraries
from u4d.errors import UserError

if TYPE_CHECKING:
    from u4d.convert import Conversion

SUMMARY = "make a four-stream checkpoint from Wan2.1, or take a Wan checkpoint out of one"
INTERRUPTED = "nothing was written; an older checkpoint is as it was"
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
ONLY_FROM_WAN = ("dtype", "streams", "frames", "size")
MEGABYTE = 10**6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="SOURCE",
        help="Wan2.1: a hub id, a folder in diffusers' layout, or the original release; see below",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the new checkpoint's folder")
    parser.add_argument("--dtype", choices=DTYPES, help="what weights are stored as (default bf16)")
    parser.add_argument(
        "--streams",
        nargs="+",
        metavar="STREAM",
        help="streams that start with Wan's patch embedding and head (default all four); others start afresh",
    )
    parser.add_argument("--frames", type=whole_number(1), metavar="N", help="frames of a clip (default 50)")
    parser.add_argument("--size", type=image_size, metavar="HxW", help="height and width of a clip (default 240x320)")
    parser.add_argument(
        "--extract", metavar="STREAM", help="the way back: write this stream of a u4d checkpoint as a Wan checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older checkpoint at OUT")


def epilog() -> str:
    """Examples, sources and what is made."""
    return """\
examples:
  u4d init --from Wan-AI/Wan2.1-T2V-1.3B-Diffusers -o wan-u4d
        downloads it (once) and makes the four-stream model: 11.4 GB, and the text encoder beside it
  u4d init --from ./Wan2.1-T2V-1.3B-Diffusers/transformer -o wan-u4d
        a transformer's folder alone gives OUT/transformer alone
  u4d init --from ./Wan2.1-T2V-1.3B -o wan-u4d
        the original release; its VAE must be safetensors (you are told the command), its text encoder is not taken
  u4d init --from wan-u4d --extract rgb -o wan-again
        the very same tensors, for diffusers' WanPipeline

SOURCE may also be one original .safetensors file. Only safetensors are read. Streams are rgb, depth, ray_dir and
ray_moment. OUT is a folder in diffusers' layout: take it with --checkpoint OUT, look at it with u4d info OUT. Weights
pass through memory one tensor at a time; only the empty prompt, once, needs the text encoder as a whole."""


def run(args: argparse.Namespace) -> None:
    """Convert, and tell what was made and what was not."""
    given = [name for name in ONLY_FROM_WAN if getattr(args, name) is not None]
    if args.extract is not None and given:
        raise UserError(f"--extract: weights come out as they are, so --{given[0]} can't go with it; leave it out")
    with Bars("MB") as bars, quiet_libraries():

        def progress(part: str, done: int, total: int) -> None:
            bars(part, done // MEGABYTE, total // MEGABYTE)

        if args.extract is not None:
            from u4d.convert import extract_stream

            done = extract_stream(args.source, args.out, args.extract, overwrite=args.overwrite, progress=progress)
        else:
            import torch

            from u4d.convert import init_from_wan
            from u4d.diffusion.flow import STREAMS

            done = init_from_wan(
                args.source,
                args.out,
                getattr(torch, DTYPES[args.dtype or "bf16"]),
                streams=STREAMS
                if args.streams is None
                else [name for word in args.streams for name in word.split(",")],
                overwrite=args.overwrite,
                num_frames=args.frames,
                image_size=args.size,
                progress=progress,
            )
    print(format_facts(facts(done)))


def facts(done: Conversion) -> list[tuple[str, str]]:
    """What a conversion did, and what may follow."""
    whole = (done.out / "model_index.json").exists()
    size = f"{done.num_bytes / 1e9:.2f} GB" if done.num_bytes > 1e8 else f"{done.num_bytes / 1e6:.1f} MB"
    return [
        ("from", done.source),
        *done.made,
        *((f"not taken: {name}", why) for name, why in done.left_out),
        ("written", f"{done.out}: {done.num_files} files, {size}"),
        ("next", f"u4d info {done.out}" if whole else f"u4d info {done.out}; a pipeline needs a vae/ too"),
    ]


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: "240x320" -> (240, 320)."""
    numbers = re.fullmatch(r"(\d+)x(\d+)", text)
    if numbers is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 240x320, got {text!r}")
    return int(numbers[1]), int(numbers[2])
