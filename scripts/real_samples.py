"""Score a checkpoint on the real recordings beside the project: RealEstate10K (poses) and 7-Scenes (depth and poses).

    python scripts/real_samples.py [--data ../shared/data] [--checkpoint tiny]

Nothing is tuned on them. 7-Scenes' depth camera is not the colour camera: depth is brought to the colour image by the
ratio of the focal lengths (585 to 508), without the 25 mm between the two, which is a few pixels at the nearest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample

import u4d
from u4d.evaluate import evaluate, fit_priors, format_markdown
from u4d.sample.observation import parse_observation

DEPTH_FOCAL, COLOUR_FOCAL = 585.0, 508.0
INVALID_MM = 65535


def real_estate(folder: Path, frames: int) -> list[u4d.Scene]:
    """Clips with cameras of arbitrary scale."""
    videos = sorted((folder / "videos").glob("*.mp4"))
    return [
        u4d.Scene.load(video, cameras=folder / "pose_files" / f"{video.stem}.txt", max_frames=frames)
        for video in videos
    ]


def seven_scenes(folder: Path, frames: int) -> u4d.Scene:
    """One clip with depth and cameras in metres, evenly sampled."""
    names = sorted(path.name.removesuffix(".pose.txt") for path in folder.glob("*.pose.txt"))
    kept = [names[i] for i in np.linspace(0, len(names) - 1, frames).round().astype(int)]
    rgb = [np.asarray(Image.open(folder / f"{name}.color.png")) for name in kept]
    depth = torch.stack([in_colour_image(read_depth(folder / f"{name}.depth.png")) for name in kept])
    poses = [np.loadtxt(folder / f"{name}.pose.txt") for name in kept]
    height, width = depth.shape[-2:]
    intrinsics = torch.tensor([[COLOUR_FOCAL, 0, width / 2], [0, COLOUR_FOCAL, height / 2], [0, 0, 1]])
    return u4d.Scene(
        rgb=torch.from_numpy(np.stack(rgb)).permute(0, 3, 1, 2).float() / 255,
        depth=depth,
        intrinsics=intrinsics.repeat(frames, 1, 1),
        cam_to_world=torch.from_numpy(np.stack(poses)).float(),
    )


def read_depth(path: Path) -> Tensor:
    """`[H,W]` metres, 0 where invalid."""
    millimetres = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32))
    return torch.where(millimetres == INVALID_MM, 0, millimetres / 1000)


def in_colour_image(depth: Tensor) -> Tensor:
    """Depth `[H,W]` as the colour camera's wider lens sees it; 0 outside."""
    height, width = depth.shape
    ratio = DEPTH_FOCAL / COLOUR_FOCAL
    rows, columns = (ratio * ((torch.arange(size) + 0.5) / size * 2 - 1) for size in (height, width))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    return grid_sample(depth[None, None], grid[None], mode="nearest", align_corners=False)[0, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--checkpoint", default="tiny")
    options = parser.parse_args()
    pipe = u4d.Pipeline.from_pretrained(options.checkpoint)
    config = pipe.transformer.config
    frames, size = config.num_frames, tuple(config.image_size)
    samples = {
        "RealEstate10K": real_estate(options.data / "re10k", frames),
        "7-Scenes RedKitchen": [seven_scenes(options.data / "seven_scenes", frames)],
    }
    for name, scenes in samples.items():
        length = scenes[0].num_frames
        training = u4d.data.ProceduralScenes("train", frames=length, size=(24, 32))
        steps, guidance = pipe.recommended(parse_observation("rgb:all", length))
        report = evaluate(
            pipe,
            (scene.resized(size) for scene in scenes),
            steps=steps,
            guidance=guidance,
            priors=fit_priors(training[index] for index in range(64)),
        )
        print(f"\n## {name}\n\n{format_markdown(report)}")


if __name__ == "__main__":
    main()
