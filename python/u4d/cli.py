"""The command line: parses, calls the verb, and turns errors into what a person wants to read.

Exit codes: 0 done, 1 a fault of ours (with its traceback), 2 a mistake in what was given, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from u4d import __version__
from u4d.commands.console import notes_on_stderr
from u4d.errors import UserError

VERBS = ("complete", "demo", "eval", "train", "init", "info", "bench")
INTERRUPTED = "older results are as they were"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError` and whose epilog may be made when help is asked for."""

    late_epilog: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see '{self.prog} --help'")

    def format_help(self) -> str:
        if self.late_epilog is not None:
            self.epilog = self.late_epilog()
        return super().format_help()


def build_parser() -> argparse.ArgumentParser:
    """The parser of `u4d` and all its verbs."""
    parser = Parser(
        prog="u4d",
        description="4D scenes from partial observations: video, depth and cameras, each completed from the others.",
        epilog="'u4d VERB --help' tells all about a verb. Start with: u4d demo",
    )
    parser.add_argument("--version", action="version", version=f"u4d {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name in VERBS:
        module = import_module(f"u4d.commands.{name}")
        verb = verbs.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        verb.late_epilog = getattr(module, "epilog", None)
        verb.set_defaults(run=module.run, interrupted=getattr(module, "INTERRUPTED", INTERRUPTED))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = argparse.Namespace(interrupted=INTERRUPTED)
    try:
        build_parser().parse_args(argv, args)
        with notes_on_stderr():
            args.run(args)
        sys.stdout.flush()
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except KeyboardInterrupt:
        print(f"\nu4d: interrupted; {args.interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `u4d info | head`: whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        line = explanation(error, args)
        if line is None:
            raise
        print(f"u4d: error: {line}", file=sys.stderr)
        return 2
    return 0


def explanation(error: Exception, args: argparse.Namespace) -> str | None:
    """One line for an error that the user can mend; None for any other."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left to write the result; free some, or choose another output"
    if isinstance(error.filename, str) and is_given(Path(error.filename), args):
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return None


def is_given(path: Path, args: argparse.Namespace) -> bool:
    """Whether a path is one of the command's own, or lies in it."""
    given = [value.absolute() for value in vars(args).values() if isinstance(value, Path)]
    return any(path.absolute() == folder or folder in path.absolute().parents for folder in given)


if __name__ == "__main__":
    sys.exit(main())
