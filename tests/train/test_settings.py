"""Settings by their dotted names, and recipes as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from u4d.errors import UserError
from u4d.train.recipe import RECIPES, FineTuning, Phase, Recipe, Source, debug_run, tiny_procedural, wan_1_3b_mixture
from u4d.train.settings import change, from_json, to_json


@pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)
def test_json_there_and_back_is_the_same(make: Callable[[], Recipe]) -> None:
    recipe = make()
    assert from_json(to_json(recipe)) == recipe
    assert to_json(from_json(to_json(recipe))) == to_json(recipe)
    assert change(recipe, []) == recipe


def test_all_kinds_of_settings() -> None:
    recipe = change(
        tiny_procedural(),
        [
            "optim.lr=3e-4",
            "batch=32",
            "phases.1.steps=500",
            "phases.0.target_floor=uniform",
            "phases.1.target_floor=0.25",
            "phases.1.frames.18=0.5",
            'phases.0.frames={"10": 1}',
            "phases.0.patterns.joint=2",
            "data.sources.0.path=/x",  # makes sense only with the next one
            "data.sources.0.kind=scenes",
            "compute.activations=none",
            "compute.compile=True",
            "preset.transformer.num_layers=4",
            "preset.transformer.image_size=[64,80]",
            "watch.save_every = 50",
            "optim.betas=0.9,0.99",
            "optim.betas.0=0.8",
        ],
    )
    assert (recipe.optim.lr, recipe.optim.betas, recipe.batch) == (3e-4, (0.8, 0.99), 32)
    first, second = recipe.phases
    assert (second.steps, second.target_floor, second.frames[18]) == (500, 0.25, 0.5)
    assert (first.target_floor, first.frames) == ("uniform", {10: 1})
    assert first.patterns == {"geometry_dense": 1.0, "joint": 2.0}
    assert recipe.data.sources == (Source("scenes", 1.0, "/x"),)
    assert (recipe.compute.activations, recipe.compute.compile, recipe.watch.save_every) == ("none", True, 50)
    assert (recipe.preset.transformer.num_layers, recipe.preset.transformer.image_size) == (4, (64, 80))
    assert second.patterns == tiny_procedural().phases[1].patterns  # all else is as it was


def test_whole_lists_are_json() -> None:
    sources = [{"kind": "scenes", "path": "a"}, {"weight": 2}]
    recipe = change(debug_run(), [f"data.sources={json.dumps(sources)}"])
    assert recipe.data.sources == (Source("scenes", 1.0, "a"), Source("procedural", 2))
    phase = {"steps": 3, "patterns": {"joint": 1}, "frames": {"6": 1}}
    assert change(debug_run(), [f"phases={json.dumps([phase])}"]).phases == (Phase(3, {"joint": 1}, {6: 1}),)


def test_a_start_is_made_changed_and_taken_away() -> None:
    made = change(debug_run(), ["start.lora_rank=8", "start.checkpoint=some/folder"])
    assert made.start == FineTuning("some/folder", 8)
    assert change(made, ["start.lora_rank=none"]).start == FineTuning("some/folder")
    assert change(wan_1_3b_mixture(), ["start.checkpoint=mine"]).start == FineTuning("mine")
    assert change(wan_1_3b_mixture(), ["start=none"]).start is None
    with pytest.raises(UserError, match=r"start\.checkpoint: expected text, got nothing"):
        change(debug_run(), ["start.lora_rank=8"])


def test_the_last_of_two_settings_counts() -> None:
    assert change(debug_run(), ["batch=3", "batch=4"]).batch == 4


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("optim.lrr=1", "optim.lr, which is 0.001 now"),
        ("lr=1", "optim.lr, which is 0.001 now"),
        ("Batch=1", "batch, which is 2 now"),
        ("optim.learning_rate.x=1", "optim."),
        ("phases.5.steps=3", "phases.0.steps, which is 4 now"),
        ("phases.-1.steps=3", "phases.0.steps"),
        ("seed.x=1", "seed, which is 0 now"),
        ("start.rank=4", "start.lora_rank, which is null now"),
        ("compute.activation=none", 'compute.activations, which is "all" now'),
        ("data.source.0.weight=2", "data.sources.0.weight, which is 1.0 now"),
        ("preset.codec.hiden=3", "preset.codec.hidden, which is 8 now"),
        ("preset.transformer.latents_mean.0=3", "preset.transformer.latents_mean, which is null now"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(setting: str, nearest: str) -> None:
    with pytest.raises(UserError) as error:
        change(debug_run(), [setting])
    assert str(error.value).startswith(f"{setting.partition('=')[0]}: no such setting; the nearest is {nearest}")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch", "expected NAME=VALUE such as optim.lr=3e-4, got 'batch'"),
        ("=3", "expected NAME=VALUE"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("batch=1.5", "batch: expected a whole number, got '1.5'"),
        ("batch=none", "batch: expected a whole number, got 'none'"),
        ("compute.compile=1", "compute.compile: expected true or false, got '1'"),
        ("start.lora_rank=two", "start.lora_rank: expected a whole number or none, got 'two'"),
        ("optim.betas=1", "optim.betas: expected 2 values, each a number, got [1]"),
        ("optim.betas=.9,x", "optim.betas: expected 2 values, each a number, got '.9,x'"),
        ("phases.0.frames={3: 1}", "phases.0.frames: expected JSON from a whole number to a number, got '{3: 1}'"),
        ("phases.0.frames.x=1", "phases.0.frames: keys: expected a whole number, got 'x'"),
        ("optim=3", "optim: expected one of its settings, optim.lr, "),
        ("start=tiny", "start: expected one of its settings, start.checkpoint, start.lora_rank, got 'tiny'"),
        ("optim.lr=-1", "optim.lr: expected a number above 0, got -1.0"),
        ("phases.0.frames.99=1", "phases.0.frames: expected at most the preset's 6 frames, got 99"),
        ("phases.0.patterns.jiont=1", "phases.0.patterns: expected names among joint, "),
        ("preset.transformer.image_size=10,20", "preset.transformer.image_size: expected (height, width), multiples"),
        ('data.sources=[{"pat": "x"}]', "data.sources.0.pat: no such field; data.sources.0 has kind, weight, path"),
        ("data.sources=[3]", "data.sources.0: expected JSON with the fields kind, weight, path, got 3"),
    ],
)
def test_values_that_are_wrong_are_named(setting: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        change(debug_run(), [setting])
    assert message in str(error.value)


def test_json_of_another_version_is_refused_and_gaps_are_filled() -> None:
    tree = json.loads(to_json(debug_run()))
    del tree["optim"]["ema"], tree["seed"]
    assert from_json(json.dumps(tree)) == debug_run()
    for text, message in (
        (json.dumps({**tree, "window": 64}), "window: no such field; a recipe has preset, "),
        (json.dumps({**tree, "optim": {"lr": "1"}}), "optim.lr: expected a number, got '1'"),
        (json.dumps({**tree, "batch": True}), "batch: expected a whole number, got True"),
        (json.dumps({**tree, "optim": None}), "optim: expected JSON with the fields lr, "),
        (json.dumps({"batch": 3}), "preset: expected JSON with the fields name, transformer, codec, got nothing"),
        ("[]", "recipe: expected JSON with the fields preset, "),
        ('{"batch": ', "recipe: expected JSON, got "),
    ):
        with pytest.raises(UserError) as error:
            from_json(text)
        assert message in str(error.value)
