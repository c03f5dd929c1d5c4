"""`u4d eval`: score a checkpoint on held-out rendered scenes, beside predictors that do not look."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u4d.commands.arguments import (
    add_checkpoint,
    add_observation,
    add_sampling,
    load_pipeline,
    observation_spec,
    weights_of,
    whole_number,
)
from u4d.commands.console import Bars
from u4d.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from u4d.data import ProceduralScenes
    from u4d.evaluate import EvaluationReport
    from u4d.model.latents import Codec
    from u4d.pipeline import Pipeline
    from u4d.scene import Scene

SUMMARY = "score a checkpoint on held-out scenes, beside trivial predictors"
SPLITS = ("test", "val", "train")
CODEC_CLIPS = 32
PRIOR_CLIPS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("--split", choices=SPLITS, default="test", help="of our own scenes (default test)")
    parser.add_argument("--clips", type=whole_number(1), default=32, metavar="N", help="how many clips (default 32)")
    add_observation(parser)
    add_sampling(parser)
    add_checkpoint(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, summaries and every clip's values")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")


def epilog() -> str:
    """Examples and what is measured."""
    return """\
examples:
  u4d eval
        depth and cameras from all images (dense), on 32 test clips
  u4d eval --observe rgb:0,-1 --clips 100 --json sparse.json
        from the first and the last image alone (sparse): the images between are scored too
  u4d eval --observe rgb:0 --candidates 16 --halving
        the best of sixteen completions, most of them given up on the way
  u4d eval --checkpoint run/checkpoint --split val --steps 10

Scenes come from u4d.data.ProceduralScenes at the checkpoint's size. Only what was not observed is scored, and the
pipeline never sees it. Trivial rows (mean depth map, static camera, straight line, mean motion) are fitted on
training scenes. The codec's own loss (PSNR of encoding and decoding) is the ceiling for the rest."""


def run(args: argparse.Namespace) -> None:
    """Evaluate, print, and write the files that were asked for."""
    from u4d.commands.output import check_file_output, write_text
    from u4d.data import ProceduralScenes
    from u4d.evaluate import format_markdown, format_text
    from u4d.evaluate.report import to_dict

    for path in (args.json, args.markdown):
        if path is not None:
            check_file_output(path)
    observe = observation_spec(args, "rgb:all")
    pipe = load_pipeline(weights_of(args))
    config = pipe.transformer.config
    scenes = ProceduralScenes(args.split, frames=config.num_frames, size=tuple(config.image_size))
    if args.clips > len(scenes):
        raise UserError(f"--clips: expected at most {len(scenes)} of split {args.split!r}, got {args.clips}")
    model, codec = measure(pipe, scenes, observe, args)
    settings = {"checkpoint": args.checkpoint, "split": args.split}
    print(f"checkpoint {args.checkpoint}, split {args.split}\n")
    print(format_text(model))
    print(format_text(codec), end="")
    if args.json is not None:
        report = {**settings, "model": to_dict(model), "codec": to_dict(codec)}
        write_text(args.json, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if args.markdown is not None:
        write_text(args.markdown, f"{format_markdown(model)}\n{format_markdown(codec)}")


def measure(
    pipe: Pipeline, scenes: ProceduralScenes, observe: str, args: argparse.Namespace
) -> tuple[EvaluationReport, EvaluationReport]:
    """Reports of the model and of its codec over the first clips of a split."""
    from u4d.commands.comparison import training_averages
    from u4d.evaluate import evaluate, evaluate_codec
    from u4d.sample.halving import plan_cuts
    from u4d.sample.observation import parse_observation

    # Wrong settings are told before anything is rendered.
    recommended, guidance = pipe.recommended(parse_observation(observe, scenes.frames))
    steps = args.steps or recommended
    cuts = plan_cuts(args.candidates, steps, args.halving)
    priors = training_averages(scenes.frames, PRIOR_CLIPS)
    seen: list[Scene] = []
    with Bars("clip") as bars:
        model = evaluate(
            WithHalving(pipe) if cuts else pipe,
            first_clips(scenes, args.clips, seen),
            observe=observe,
            steps=steps,
            guidance=guidance if args.guidance is None else args.guidance,
            candidates=args.candidates,
            clips=args.clips,
            seed=args.seed,
            priors=priors,
            progress=lambda done, total: bars("clips", done, total),
        )
        codec = evaluate_codec(
            ThereAndBack(pipe.codec, pipe.device),
            seen,
            clips=len(seen),
            progress=lambda done, total: bars("codec", done, total),
        )
    if cuts:
        counts = " -> ".join(map(str, [args.candidates, *(cut.keep for cut in cuts)]))
        model = replace(model, settings={**model.settings, "halving": counts})
    return model, codec


@dataclass(frozen=True, eq=False)
class WithHalving:
    """A pipeline that gives candidates up between steps."""

    pipe: Pipeline

    def complete(self, scene: Scene, **settings: Any) -> Scene:
        """As the pipeline's own."""
        return self.pipe.complete(scene, halving=True, **settings)


def first_clips(scenes: ProceduralScenes, count: int, seen: list[Scene]) -> Iterator[Scene]:
    """Render clip after clip; the first few stay in `seen`, for the codec."""
    for index in range(count):
        scene = scenes[index]
        if len(seen) < CODEC_CLIPS:
            seen.append(scene)
        yield scene


@dataclass(frozen=True, eq=False)
class ThereAndBack:
    """A codec as `evaluate_codec` wants it: one clip in, the same clip out."""

    codec: Codec
    device: torch.device

    def reconstruct_rgb(self, rgb: Tensor) -> Tensor:
        """[N,3,H,W] in [0,1] -> the same."""
        return (self._reconstruct(rgb * 2 - 1, "rgb") + 1) / 2

    def reconstruct_depth(self, channel: Tensor) -> Tensor:
        """[N,H,W] in [-1,1] -> the same."""
        return self._reconstruct(channel[:, None], "depth")[:, 0]

    def _reconstruct(self, clip: Tensor, stream: str) -> Tensor:
        import torch

        with torch.no_grad():
            latents = self.codec.encode(clip[None].to(self.device), stream)
            return self.codec.decode(latents, stream, len(clip))[0]
