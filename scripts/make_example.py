"""Render the example clip that ships: one of our own test scenes with its true depth and cameras.

    python scripts/make_example.py [--index N] [--out FOLDER]

It replaces python/u4d/examples/room. To choose another scene, look at several first: --index N --out /tmp/look --full
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from u4d.data import ProceduralScenes
from u4d.scene import Scene

INDEX = 72
FRAMES, SIZE, FPS = 18, (192, 256), 12.0
MANTISSA_BITS = 11  # depth keeps 1 part in 4000, and the file becomes four times smaller
FOR_PEOPLE = ("depth.mp4", "points.ply", "summary.png")  # made again by every `u4d complete`; large
ROOM = Path(__file__).resolve().parents[1] / "python" / "u4d" / "examples" / "room"


def main() -> None:
    """Render, round, save."""
    parser = argparse.ArgumentParser(description="Render the example clip that ships with u4d.")
    parser.add_argument("--index", type=int, default=INDEX, help=f"scene of the test split (default {INDEX})")
    parser.add_argument("--out", type=Path, default=ROOM, help="the saved scene folder to write or replace")
    parser.add_argument("--full", action="store_true", help="also keep the files that are left out of the package")
    args = parser.parse_args()
    scene = ProceduralScenes("test", frames=FRAMES, size=SIZE)[args.index]
    caption = f"a rendered scene (u4d.data.procedural, test {args.index})"
    assert scene.depth is not None  # our renderings know everything
    scene = replace(scene, depth=rounded(scene.depth), fps=FPS, caption=caption)
    scene.save(args.out, overwrite=True)
    if not args.full:
        for name in FOR_PEOPLE:
            (args.out / name).unlink()
    check(args.out, scene)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: scene {args.index} of the test split, {size / 1e6:.2f} MB")


def rounded(depth: torch.Tensor) -> torch.Tensor:
    """float32 rounded to MANTISSA_BITS bits of mantissa."""
    dropped = 23 - MANTISSA_BITS
    bits = depth.numpy().view(np.uint32) + np.uint32(1 << (dropped - 1))
    return torch.from_numpy((bits >> dropped << dropped).view(np.float32))


def check(folder: Path, scene: Scene) -> None:
    """Read the folder back: depth and cameras exactly, pictures as video keeps them."""
    stored = Scene.load(folder)
    for name in ("depth", "intrinsics", "cam_to_world"):
        if not torch.equal(getattr(stored, name), getattr(scene, name)):
            raise SystemExit(f"{folder}: {name} did not survive saving")
    assert stored.rgb is not None and scene.rgb is not None
    error = float((stored.rgb - scene.rgb).square().mean())
    if error > 1e-3:
        raise SystemExit(f"{folder}: the video is {-10 * np.log10(error):.1f} dB from the rendering; expected over 30")


if __name__ == "__main__":
    main()
