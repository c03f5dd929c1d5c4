"""`u4d complete`: a video (or any part of a scene) in, a complete 4D scene out."""

from __future__ import annotations

import argparse
from pathlib import Path

from u4d.commands.arguments import (
    add_checkpoint,
    add_observation,
    add_sampling,
    add_windows,
    observation_spec,
    weights_of,
    whole_number,
)

SUMMARY = "complete a video, images or a partial scene into depth, cameras and a saved 4D scene"

EXAMPLES = """\
examples:
  u4d complete clip.mp4 -o out/clip
        depth and cameras of a video
  u4d complete frames/ -o out/room --candidates 4 --steps 20
        the same for a folder of images: the most consistent of four completions
  u4d complete clip.mp4 -o out/path --cameras cameras.txt
        with known cameras: depth comes in their unit
  u4d complete clip.mp4 -o out/between --task interpolate
        the images between the first and the last, with their depth and cameras
  u4d complete photo.jpg -o out/photo --frames 18 --seed 3
        one image observed, 17 more generated
  u4d complete walk.mp4 -o out/walk --window 18
        every frame of a long video, 18 at a time, in one world frame and one scale
  u4d complete out/clip -o out/again --observe "camera:all,rgb:0,-1"
        from a saved scene, as if only its cameras and two images were known"""

OBSERVATIONS = """\
observations (--observe), separated by commas; indices are frames of the input, the first is 0:
  rgb:all               all images
  rgb:0,-1              the first and the last image; negative indices count from the end
  camera:all,rgb:0      all cameras (intrinsics and poses) and the first image
  rgb:0:5,depth:::2     Python slices: images 0 to 4, and every second depth map
  none                  nothing: everything is generated"""

INPUTS = """\
INPUT is one of: a video; an image; a folder of images in the order of their names; a saved scene folder;
a nerfstudio transforms.json or its folder. It may have any number of frames and any size: it is sampled (with
--window it is not) and resized to the clip of the checkpoint (tiny: 18 frames of 96x128), intrinsics following.

OUT becomes a folder: scene.json (cameras, scale, report), rgb.mp4, depth.npz (float32, metres or units),
depth.mp4, trajectory.tum, points.ply, summary.png. Cameras are OpenCV camera-to-world (x right, y down,
z forward); the centre of the first pixel is (0.5, 0.5). u4d.Scene.load(OUT) reads it back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("input", type=Path, metavar="INPUT", help="what is known: see below")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the folder to write")
    add_observation(parser)
    parser.add_argument(
        "--cameras",
        type=Path,
        metavar="FILE",
        help="a camera path for INPUT: nerfstudio json, RealEstate10K text or TUM. It is observed (camera:all) unless "
        "--observe or --task say otherwise; cameras that are not observed are compared with the result",
    )
    add_sampling(parser)
    parser.add_argument(
        "--frames",
        type=whole_number(1),
        metavar="N",
        help="frames of the result (default: the input's, up to the checkpoint's; with --window, all)",
    )
    add_windows(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="in words; for checkpoints with a text encoder")
    add_checkpoint(parser)
    parser.add_argument("--original-size", action="store_true", help="return results at the size of the input")
    parser.add_argument("--lossless", action="store_true", help="PNG frames instead of rgb.mp4")
    parser.add_argument("--overwrite", action="store_true", help="replace an older result in OUT")


def epilog() -> str:
    """Examples, tasks and conventions: what is needed to use the verb."""
    from u4d.sample.observation import TASKS

    width, spec = max(map(len, TASKS)), max(len(task.observe) for task in TASKS.values())
    tasks = [f"  {name:<{width}}  {task.observe:<{spec}}  {task.description}" for name, task in TASKS.items()]
    return "\n\n".join([EXAMPLES, OBSERVATIONS, "\n".join(["tasks (--task NAME is --observe SPEC):", *tasks]), INPUTS])


def run(args: argparse.Namespace) -> None:
    """Complete."""
    from u4d.commands.completion import Job, complete_to_folder

    job = Job(
        source=args.input,
        out=args.out,
        observe=observation_spec(args, "rgb:all" if args.cameras is None else "rgb:all,camera:all"),
        cameras=args.cameras,
        steps=args.steps,
        guidance=args.guidance,
        candidates=args.candidates,
        halving=args.halving,
        seed=args.seed,
        frames=args.frames,
        window=args.window,
        overlap=args.overlap,
        prompt=args.prompt,
        weights=weights_of(args),
        original_size=args.original_size,
        lossless=args.lossless,
        overwrite=args.overwrite,
    )
    complete_to_folder(job)
