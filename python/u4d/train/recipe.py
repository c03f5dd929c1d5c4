"""Recipes: everything that a training run is made of, as frozen dataclasses returned by functions.

Each dataclass checks itself when it is made, so a recipe that exists makes sense; `u4d.train.settings` changes recipes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from u4d.diffusion.patterns import PATTERNS
from u4d.presets import Preset, debug, tiny, wan_1_3b
from u4d.train.checks import require, require_counts, require_odds, require_positive, require_shares

KINDS = ("procedural", "scenes")
PRECISIONS = ("bf16", "fp32")
ACTIVATIONS = ("all", "attention", "none")
MIXTURE = (
    "realestate10k",
    "dl3dv10k",
    "spatialvid",
    "scannetpp",
    "agibot_world",
    "omniworld",
    "virtual_kitti2",
    "pointodyssey",
)
"""The seed's training sets; 7-Scenes is for evaluation alone."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one mix of tasks.

    Attributes:
        steps: optimiser steps.
        patterns: relative frequency of each conditioning pattern.
        frames: relative frequency of each clip length.
        target_floor: "uniform", or a number: the lowest noise level of a target (see `draw_times`).
        clean_context_prob: how often context is exactly clean.
        rgb_only: how often a clip's geometry is hidden, as if its data set had none.
        null_text: how often a clip's caption is hidden, so that the model also knows to go without.
    """

    steps: int
    patterns: dict[str, float]
    frames: dict[int, float]
    target_floor: str | float = "uniform"
    clean_context_prob: float = 0.5
    rgb_only: float = 0.0
    null_text: float = 0.1

    def __post_init__(self) -> None:
        require_counts(self, 1, "steps")
        for name in self.patterns:
            require(name in PATTERNS, "patterns", f"names among {', '.join(PATTERNS)}", name)
        for length in self.frames:
            require(length >= 1, "frames", "clip lengths from 1", length)
        require_odds("patterns", self.patterns)
        require_odds("frames", self.frames)
        uniform = self.target_floor == "uniform"
        numeric = not isinstance(self.target_floor, str) and 0 <= self.target_floor <= 1
        require(uniform or numeric, "target_floor", '"uniform" or a number from 0 to 1', self.target_floor)
        require_shares(self, "clean_context_prob", "rgb_only", "null_text")


@dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up and, over the last `decay` fraction of the run, linear decay to zero.

    Attributes:
        lr, betas, weight_decay: AdamW's; only matrices decay.
        clip: largest norm of the gradient.
        warmup: steps.
        decay: share of the run; 0 keeps the rate constant after the warm-up.
        ema: share of itself that the average of the weights keeps at each step.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    warmup: int = 100
    decay: float = 0.3
    ema: float = 0.995

    def __post_init__(self) -> None:
        require_positive(self, "lr", "clip")
        require_counts(self, 1, "warmup")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "a number from 0", self.weight_decay)
        require(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers from 0 to below 1", self.betas)
        require(0 <= self.ema < 1, "ema", "a number from 0 to below 1", self.ema)
        require_shares(self, "decay")


@dataclass(frozen=True)
class CodecTraining:
    """How the tiny codec is made: PCA from `pca_clips`, then `steps` of Adam."""

    steps: int = 800
    pca_clips: int = 48
    window: int = 32
    clips_per_step: int = 6
    statistics_clips: int = 96
    lr: float = 2e-3

    def __post_init__(self) -> None:
        require_counts(self, 1, "steps", "pca_clips", "window", "clips_per_step", "statistics_clips")
        require(self.clips_per_step <= self.window, "clips_per_step", f"at most {self.window}", self.clips_per_step)
        require_positive(self, "lr")


@dataclass(frozen=True)
class Source:
    """Where clips come from.

    Attributes:
        kind: "procedural" for our own renderings, "scenes" for a folder of saved scenes, videos and folders of images.
        weight: relative frequency among the sources.
        path: the folder of "scenes".
    """

    kind: str = "procedural"
    weight: float = 1.0
    path: str = ""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", self.kind)
        require_positive(self, "weight")
        if self.kind == "scenes":
            require(bool(self.path), "path", 'the folder of "scenes"', self.path)
        else:
            require(not self.path, "path", f'none, since "{self.kind}" needs no folder (kind "scenes" does)', self.path)


@dataclass(frozen=True)
class Data:
    """What clips a run sees.

    Attributes:
        sources: each clip's source is drawn by their weights.
        window: clips made together for each place in the batch; each is used for `draws` passes in random order.
        draws: noise draws per clip.
        most_bad: share of clips that may turn out unreadable before the run stops.
    """

    sources: tuple[Source, ...] = (Source(),)
    window: int = 8
    draws: int = 2
    most_bad: float = 0.01

    def __post_init__(self) -> None:
        require(bool(self.sources), "sources", "at least one", self.sources)
        require_counts(self, 1, "window", "draws")
        require_shares(self, "most_bad")


@dataclass(frozen=True)
class Compute:
    """How a step is computed; none of it changes what is computed, but for rounding.

    Attributes:
        precision: "bf16" (products in bfloat16 over float32 weights) or "fp32".
        micro_batch: clips in a forward of one process; 0 for the process's whole share of the batch.
        activations: what is kept for the backward pass: "all", "attention" (attention's results; the rest is computed
            again), or "none" (every block is computed again).
        compile: compile the blocks with torch.compile.
    """

    precision: str = "bf16"
    micro_batch: int = 0
    activations: str = "all"
    compile: bool = False

    def __post_init__(self) -> None:
        require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        require(self.activations in ACTIVATIONS, "activations", f"one of {', '.join(ACTIVATIONS)}", self.activations)
        require_counts(self, 0, "micro_batch")


@dataclass(frozen=True)
class Watching:
    """What is written while a run goes on.

    Attributes:
        save_every: steps between saved states, of which the last `keep` are kept.
        validate_every: steps between validations; 0 for none.
        validation_clips: clips of each validation.
    """

    save_every: int = 100
    keep: int = 2
    validate_every: int = 0
    validation_clips: int = 8

    def __post_init__(self) -> None:
        require_counts(self, 1, "save_every", "keep", "validation_clips")
        require_counts(self, 0, "validate_every")


@dataclass(frozen=True)
class FineTuning:
    """A run that begins with a checkpoint's codec, latent statistics and transformer.

    Attributes:
        checkpoint: a shipped preset, a folder, or a hub id; its sizes must be those of the recipe's preset.
        lora_rank: train adapters of this rank and nothing else; None trains all weights.
    """

    checkpoint: str
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.checkpoint), "checkpoint", "a shipped preset, a folder or a hub id", self.checkpoint)
        if self.lora_rank is not None:
            require_counts(self, 1, "lora_rank")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        preset: sizes of model and codec.
        phases: one after the other.
        batch: clips of an optimiser step over all processes.
        start: what the run begins with; None makes a codec and draws fresh weights.
    """

    preset: Preset
    phases: tuple[Phase, ...]
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    codec: CodecTraining = field(default_factory=CodecTraining)
    compute: Compute = field(default_factory=Compute)
    watch: Watching = field(default_factory=Watching)
    batch: int = 8
    seed: int = 0
    start: FineTuning | None = None

    def __post_init__(self) -> None:
        require(bool(self.phases), "phases", "at least one", self.phases)
        require_counts(self, 1, "batch")
        require_counts(self, 0, "seed")
        most = self.preset.transformer.num_frames
        for index, phase in enumerate(self.phases):
            longest = max(phase.frames)
            require(longest <= most, f"phases.{index}.frames", f"at most the preset's {most} frames", longest)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that a step belongs to; the last one for every later step."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


def tiny_procedural() -> Recipe:
    """The shipped `tiny` weights on our own ray-traced scenes: geometry from RGB first, then all five patterns."""
    return Recipe(
        preset=tiny(),
        phases=(
            Phase(
                steps=800,
                patterns={"geometry_dense": 1.0},
                frames={10: 0.7, 18: 0.3},
                target_floor=0.9,
                clean_context_prob=1.0,
            ),
            Phase(
                steps=1800,
                patterns={
                    "joint": 0.1,
                    "first_frames": 0.15,
                    "geometry_dense": 0.4,
                    "camera_control": 0.2,
                    "geometry_sparse": 0.15,
                },
                frames={1: 0.02, 2: 0.02, 5: 0.03, 6: 0.08, 8: 0.05, 10: 0.3, 14: 0.1, 18: 0.4},
                clean_context_prob=0.75,
                rgb_only=0.1,
            ),
        ),
    )


def wan_1_3b_mixture() -> Recipe:
    """The seed's system: four streams from Wan2.1-T2V-1.3B, eight data sets, 30k steps of 16 clips on 4 x H200.

    It begins with the folder `wan4` that `u4d init --from Wan-AI/Wan2.1-T2V-1.3B-Diffusers -o wan4` makes; another one:
    `--set start.checkpoint=...`. Data sets are read as folders of scenes, `data/<name>`, whose clips know what spec.md
    section 3 lists; readers of their own formats come later. The seed names no shares, so all eight count alike. On
    4 GPUs each one computes its 4 clips one after the other. What is kept for the backward pass is what `u4d train
    wan_1_3b_mixture --plan` shows to fit.
    """
    return Recipe(
        preset=wan_1_3b(),
        phases=(Phase(steps=30_000, patterns=dict.fromkeys(PATTERNS, 1.0), frames={50: 1.0}),),
        data=Data(sources=tuple(Source("scenes", path=f"data/{name}") for name in MIXTURE)),
        optim=Optim(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, clip=5.0, warmup=1000, decay=0.0, ema=0.999),
        compute=Compute(precision="bf16", micro_batch=1, activations="attention", compile=True),
        watch=Watching(save_every=500, keep=2, validate_every=1000, validation_clips=16),
        batch=16,
        start=FineTuning("wan4"),
    )


def debug_run() -> Recipe:
    """Seconds on any machine; for tests."""
    patterns = {"joint": 1.0, "geometry_dense": 2.0}
    return Recipe(
        preset=debug(),
        phases=(Phase(steps=4, patterns=patterns, frames={3: 1.0, 6: 1.0}),),
        data=Data(window=2, draws=1),
        codec=CodecTraining(steps=2, pca_clips=4, window=4, clips_per_step=2, statistics_clips=4),
        watch=Watching(save_every=2),
        batch=2,
    )


RECIPES = {"tiny_procedural": tiny_procedural, "wan_1_3b_mixture": wan_1_3b_mixture, "debug": debug_run}
