"""Recipes are the ones of the seed and of the model card, and refuse what makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from u4d.diffusion.patterns import PATTERNS
from u4d.errors import UserError
from u4d.train.recipe import (
    RECIPES,
    CodecTraining,
    Compute,
    Data,
    FineTuning,
    Optim,
    Phase,
    Recipe,
    Source,
    Watching,
    debug_run,
    wan_1_3b_mixture,
)


def test_the_seeds_recipe() -> None:
    recipe = wan_1_3b_mixture()
    optim, compute = recipe.optim, recipe.compute
    assert (optim.lr, optim.betas, optim.weight_decay, optim.clip) == (1e-5, (0.9, 0.95), 0.05, 5.0)
    assert (optim.warmup, optim.decay) == (1000, 0.0)  # then constant
    assert (recipe.batch, compute.micro_batch, recipe.steps) == (16, 1, 30_000)
    assert (compute.precision, compute.compile) == ("bf16", True)
    (phase,) = recipe.phases
    assert phase.patterns == dict.fromkeys(PATTERNS, 1.0)
    assert (phase.frames, phase.target_floor, phase.clean_context_prob) == ({50: 1.0}, "uniform", 0.5)
    assert recipe.preset.name == "wan-1.3b" and recipe.start == FineTuning("wan4")


def test_the_seeds_eight_data_sets_count_alike() -> None:
    sources = wan_1_3b_mixture().data.sources
    assert len(sources) == len({source.path for source in sources}) == 8
    assert {(source.kind, source.weight) for source in sources} == {("scenes", 1.0)}
    assert all(source.path.startswith("data/") and "7scenes" not in source.path for source in sources)


def test_every_recipe_has_a_line_to_be_shown() -> None:
    assert set(RECIPES) == {"tiny_procedural", "wan_1_3b_mixture", "debug"}
    for make in RECIPES.values():
        assert isinstance(make(), Recipe) and (make.__doc__ or "").strip().splitlines()[0].endswith(".")


def test_phases_end_where_the_next_begins() -> None:
    phases = tuple(Phase(steps=steps, patterns={"joint": 1.0}, frames={3: 1.0}) for steps in (2, 3))
    recipe = replace(debug_run(), phases=phases)
    assert recipe.steps == 5
    assert [recipe.phase_at(step) is phases[0] for step in range(6)] == [True, True, False, False, False, False]


def phase(**changes: Any) -> Phase:
    return Phase(**{"steps": 1, "patterns": {"joint": 1.0}, "frames": {3: 1.0}, **changes})


def recipe(**changes: Any) -> Recipe:
    return replace(debug_run(), **changes)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (recipe, {"batch": 0}, "batch: expected a whole number from 1, got 0"),
        (recipe, {"batch": 2.5}, "batch: expected a whole number"),
        (recipe, {"seed": -1}, "seed: expected a whole number from 0"),
        (recipe, {"phases": ()}, "phases: expected at least one"),
        (recipe, {"phases": (phase(frames={7: 1.0}),)}, r"phases\.0\.frames: expected at most the preset's 6 .* got 7"),
        (phase, {"steps": 0}, "steps: expected a whole number from 1"),
        (phase, {"patterns": {"jiont": 1.0}}, "patterns: expected names among joint, .*got 'jiont'"),
        (phase, {"patterns": {"joint": 0.0}}, "patterns: expected a frequency above 0"),
        (phase, {"patterns": {"joint": -1.0}}, r"patterns\.joint: expected a relative frequency"),
        (phase, {"frames": {}}, "frames: expected a frequency above 0"),
        (phase, {"frames": {0: 1.0}}, "frames: expected clip lengths from 1, got 0"),
        (phase, {"target_floor": "unifrom"}, 'target_floor: expected "uniform" or a number'),
        (phase, {"target_floor": 1.5}, "target_floor: expected"),
        (phase, {"rgb_only": 1.5}, "rgb_only: expected a number from 0 to 1, got 1.5"),
        (Optim, {"lr": 0.0}, "lr: expected a number above 0, got 0.0"),
        (Optim, {"lr": float("nan")}, "lr: expected a number above 0, got nan"),
        (Optim, {"betas": (0.9, 1.0)}, "betas: expected two numbers"),
        (Optim, {"warmup": 0}, "warmup: expected a whole number from 1"),
        (Optim, {"decay": -0.1}, "decay: expected a number from 0 to 1"),
        (Optim, {"ema": 1.0}, "ema: expected a number from 0 to below 1"),
        (Source, {"kind": "video"}, "kind: expected one of procedural, scenes, got 'video'"),
        (Source, {"kind": "scenes"}, "path: expected the folder"),
        (Source, {"path": "clips"}, "path: expected none"),
        (Source, {"weight": 0.0}, "weight: expected a number above 0"),
        (Data, {"sources": ()}, "sources: expected at least one"),
        (Data, {"window": 0}, "window: expected a whole number from 1"),
        (Data, {"most_bad": 2.0}, "most_bad: expected a number from 0 to 1"),
        (Compute, {"precision": "fp8"}, "precision: expected one of bf16, fp32, got 'fp8'"),
        (Compute, {"activations": "some"}, "activations: expected one of all, attention, none, got 'some'"),
        (Compute, {"micro_batch": -1}, "micro_batch: expected a whole number from 0"),
        (Watching, {"keep": 0}, "keep: expected a whole number from 1"),
        (CodecTraining, {"window": 2, "clips_per_step": 3}, "clips_per_step: expected at most 2, got 3"),
        (FineTuning, {"checkpoint": ""}, "checkpoint: expected a shipped preset"),
        (FineTuning, {"checkpoint": "tiny", "lora_rank": 0}, "lora_rank: expected a whole number from 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[..., object], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**given)
