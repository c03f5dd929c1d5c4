"""`u4d demo`: the shipped example, completed from its images alone and compared with its true depth and cameras."""

from __future__ import annotations

import argparse
from pathlib import Path

from u4d.commands.arguments import add_checkpoint, weights_of

SUMMARY = "complete the shipped example clip, or your own, and show what comes out"
EXAMPLE = Path(__file__).parents[1] / "examples" / "room"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("--clip", type=Path, metavar="FILE", help="your own video or folder of images")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="OUT",
        help="the folder to write (default out/demo); an older result in it is replaced",
    )
    add_checkpoint(parser)


def run(args: argparse.Namespace) -> None:
    """Complete the example, or the user's clip."""
    from u4d.commands.comparison import training_averages
    from u4d.commands.completion import Job, complete_to_folder

    source = EXAMPLE if args.clip is None else args.clip
    job = Job(source=source, out=args.out, weights=weights_of(args), overwrite=True)
    complete_to_folder(job, priors=training_averages if args.clip is None else None)
    print(f"\nLook at {args.out / 'summary.png'}. Next: u4d complete YOUR_VIDEO -o out/yours, or u4d complete --help")
