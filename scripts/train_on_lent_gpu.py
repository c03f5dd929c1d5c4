"""Train `tiny` on a GPU that is lent for minutes, and bring the weights back while it goes on.

    python scripts/train_on_lent_gpu.py --minutes 9 --out $OUT            # again: it goes on from the last saved state
    python scripts/train_on_lent_gpu.py --join FOLDER --out runs/tiny25   # at home: the pieces become a checkpoint

A call trains for so many minutes at most and scores the checkpoint at the end. Every two minutes it puts into --out the
averaged weights, in pieces of at most 15 MiB (`checkpoint.tar.0`, ...), and `log.jsonl`; in the end also `eval.md`.
Every file there is whole at any moment. The run's own state (weights, averages, AdamW: 330 MB) stays in --run: a
machine that is kept goes on exactly; on a new one a run begins with the checkpoint that was brought back (--from).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

PIECE = 15 * 2**20
SETTINGS = ("batch=256", "data.window=1", "watch.validate_every=500", "watch.save_every=200", "compute.compile=true")
STEPS = ("phases.0.steps=1500", "phases.1.steps=4500")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny_procedural")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny25"), help="the run's folder; must stay git-ignored")
    parser.add_argument("--out", type=Path, required=True, help="what comes back (or, with --join, the checkpoint)")
    parser.add_argument("--minutes", type=float, default=9.0, help="of training and scoring together")
    parser.add_argument("--score-minutes", type=float, default=1.0, help="kept for scoring")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between copies of the weights")
    parser.add_argument("--clips", type=int, default=160, help="clips to score")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=14, help="processes that render")
    parser.add_argument("--from", dest="start", help="checkpoint to begin with")
    parser.add_argument("--set", nargs="*", default=[*SETTINGS, *STEPS], help="the recipe's settings, all of them")
    parser.add_argument("--join", type=Path, help="folder with the pieces that came back")
    options = parser.parse_args()
    if options.join:
        join(options.join, options.out)
    else:
        train(options)


def train(options: argparse.Namespace) -> None:
    """Train until the time is over or the recipe's steps are done; then score."""
    deadline = time.monotonic() + 60 * (options.minutes - options.score_minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = ["--from", options.start] if options.start else []
    arguments = ["train", options.recipe, "-o", options.run, "--device", options.device, *begin]
    changed = ["--set", *options.set] if options.set else []
    process = subprocess.Popen(u4d(*arguments, "--workers", options.workers, *changed))
    while process.poll() is None and time.monotonic() < deadline:
        wait = min(options.every, max(0.0, deadline - time.monotonic()))
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            bring_back(options.run, options.out)
    if process.poll() is None:
        process.terminate()  # a saved state is whole or not there, so nothing is lost but the steps after it
    stopped = process.wait()
    exported = bring_back(options.run, options.out)
    if exported:
        scored = ["--device", options.device, "--clips", options.clips, "--steps", 1, "--guidance", 1]
        subprocess.run(
            u4d("eval", "--checkpoint", exported, *scored, "--markdown", options.out / "eval.md"), check=True
        )
    if stopped not in (0, -signal.SIGTERM):
        raise SystemExit(f"training ended with exit code {stopped}")


def u4d(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "u4d.cli", *map(str, arguments)]


def bring_back(run: Path, out: Path) -> Path | None:
    """Export the newest saved state and put it into `out`; None where nothing is saved yet."""
    exported = run / "brought_back"
    done = subprocess.run(u4d("train", "--export", run, "-o", exported), capture_output=True, text=True)
    if done.returncode:
        print(f"nothing to bring back yet: {done.stderr.strip()}", flush=True)
        return None
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(exported, arcname="checkpoint")
    content = packed.getbuffer()
    for number, start in enumerate(range(0, len(content), PIECE)):
        write_whole(out / f"checkpoint.tar.{number}", content[start : start + PIECE])
    log = run / "log.jsonl"
    if log.exists():
        write_whole(out / "log.jsonl", log.read_bytes())
    print(f"brought back {len(content) / 1e6:.1f} MB", flush=True)
    return exported


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file, or leave the older one as it is."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def join(folder: Path, out: Path) -> None:
    """Put the pieces together and unpack the checkpoint to `out`."""
    pieces = sorted(folder.glob("checkpoint.tar.*"), key=lambda path: int(path.suffix[1:]))
    if not pieces:
        raise SystemExit(f"{folder}: expected checkpoint.tar.0 and so on, found none")
    if out.exists():
        raise SystemExit(f"{out}: is there already; choose a new folder")
    unpacked = out.with_name(out.name + ".unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as tar:
        tar.extractall(unpacked, filter="data")
    (unpacked / "checkpoint").rename(out)
    unpacked.rmdir()
    print(f"written to {out}; next: u4d eval --checkpoint {out}")


if __name__ == "__main__":
    main()
