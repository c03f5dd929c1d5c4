"""Recipes: everything that a training run is made of, as frozen dataclasses returned by functions."""

from __future__ import annotations

from dataclasses import dataclass, field

from u4d.presets import Preset, debug, tiny


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
    """

    steps: int
    patterns: dict[str, float]
    frames: dict[int, float]
    target_floor: str | float = "uniform"
    clean_context_prob: float = 0.5
    rgb_only: float = 0.0


@dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up and, over the last `decay` fraction of the run, linear decay to zero."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip: float = 1.0
    warmup: int = 100
    decay: float = 0.3
    ema: float = 0.995


@dataclass(frozen=True)
class CodecTraining:
    """How the tiny codec is made: PCA from `pca_clips`, then `steps` of Adam."""

    steps: int = 800
    pca_clips: int = 48
    window: int = 32
    clips_per_step: int = 6
    statistics_clips: int = 96
    lr: float = 2e-3


@dataclass(frozen=True)
class FineTuning:
    """A run that begins with a checkpoint's codec, latent statistics and transformer.

    Attributes:
        checkpoint: a shipped preset, a folder, or a hub id; its sizes must be those of the recipe's preset.
        lora_rank: train adapters of this rank and nothing else; None trains all weights.
    """

    checkpoint: str
    lora_rank: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        preset: sizes of model and codec.
        start: what the run begins with; None makes a codec and draws fresh weights.
        window: clips rendered together; each window's clips are used for `draws` passes in random order.
        draws: noise draws per rendered clip.
    """

    preset: Preset
    phases: tuple[Phase, ...]
    optim: Optim = field(default_factory=Optim)
    codec: CodecTraining = field(default_factory=CodecTraining)
    batch: int = 8
    window: int = 64
    draws: int = 2
    seed: int = 0
    save_every: int = 100
    start: FineTuning | None = None

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


def debug_run() -> Recipe:
    """Seconds on any machine; for tests."""
    patterns = {"joint": 1.0, "geometry_dense": 2.0}
    return Recipe(
        preset=debug(),
        phases=(Phase(steps=4, patterns=patterns, frames={3: 1.0, 6: 1.0}),),
        codec=CodecTraining(steps=2, pca_clips=4, window=4, clips_per_step=2, statistics_clips=4),
        batch=2,
        window=4,
        draws=1,
        save_every=2,
    )


RECIPES = {"tiny_procedural": tiny_procedural, "debug": debug_run}
