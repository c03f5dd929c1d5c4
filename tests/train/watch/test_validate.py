"""Validation: the same every time, without a trace in training, and right about a model that knows the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import u4d
import u4d.train.watch.validate as validation
from u4d.clips import Clips
from u4d.diffusion.patterns import PATTERNS
from u4d.evaluate import evaluate
from u4d.model.codec import TinyCodec
from u4d.model.latents import Statistics, encode_streams
from u4d.model.streams import Streams
from u4d.model.transformer import Transformer
from u4d.train.recipe import Compute, Recipe, Watching, debug_run
from u4d.train.watch.validate import Validation, admitted, fixed_clips, validate

CLIPS = 4


@dataclass
class Parts:
    """What is validated."""

    model: nn.Module
    codec: Any
    statistics: Statistics
    recipe: Recipe

    def validate(self, **changes: Any) -> Validation:
        parts = replace(self, **changes)
        return validate(parts.model, parts.codec, parts.statistics, parts.recipe, 7, "cpu")


@pytest.fixture
def parts() -> Parts:
    recipe = replace(debug_run(), compute=Compute(precision="fp32"), watch=Watching(validation_clips=CLIPS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(recipe.preset.transformer)
        assert recipe.preset.codec is not None
        codec = TinyCodec(**asdict(recipe.preset.codec)).eval()
    return Parts(model, codec, Statistics(torch.zeros(4, 16), torch.ones(4, 16), 1.0), recipe)


class RememberingCodec:
    """Decodes the latents that it has encoded last without any error, and no others."""

    def __init__(self, codec: TinyCodec) -> None:
        self.codec, self.last = codec, dict[str, tuple[Tensor, Tensor]]()

    def encode(self, clip: Tensor, stream: str) -> Tensor:
        latents = self.codec.encode(clip, stream)
        self.last[stream] = latents, clip
        return latents

    def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor:
        expected, clip = self.last[stream]
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
        return clip


class Oracle(nn.Module):
    """Answers with the exact velocity: it is told the clean latents."""

    clean: Tensor

    def forward(self, latents: Tensor, times: Tensor) -> Tensor:
        t = times[:, :, None, :, None, None]
        return torch.where(t > 0, (latents - self.clean) / t.clamp_min(1e-6), 0)


@pytest.fixture
def oracle(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Parts:
    model = Oracle()

    def tell(streams: Streams, codec: Any, statistics: Statistics) -> Tensor:
        model.clean = encode_streams(streams, codec, statistics)
        return model.clean

    monkeypatch.setattr(validation, "encode_streams", tell)
    return replace(parts, model=model, codec=RememberingCodec(parts.codec))


def test_a_model_that_knows_the_answer_is_found_perfect(oracle: Parts) -> None:
    result = oracle.validate()
    assert result.step == 7 and list(result.losses) == list(PATTERNS)
    assert max(loss for losses in result.losses.values() for loss in losses if not math.isnan(loss)) < 1e-8
    assert result.metrics["abs_rel"] < 1e-4 and result.metrics["delta_1_25"] > 0.999
    assert result.metrics["translation_direction_deg"] < 0.5 and result.metrics["rotation_first_to_last_deg"] < 0.1
    assert min(result.correlations.values()) > 0.99 and len(result.correlations) == 6


def test_a_model_that_knows_nothing_is_not(parts: Parts) -> None:
    result = parts.validate()
    assert min(loss for losses in result.losses.values() for loss in losses if not math.isnan(loss)) > 0.1
    assert result.metrics["abs_rel"] > 0.1


def test_losses_are_those_of_targets(parts: Parts) -> None:
    losses = parts.validate().losses
    without = {name: [math.isnan(loss) for loss in values] for name, values in losses.items()}
    assert without["joint"] == without["first_frames"] == without["geometry_sparse"] == [False] * 4
    assert without["geometry_dense"] == [True, False, False, False]
    assert without["camera_control"] == [False, False, True, True]


def test_short_clips_lose_the_patterns_that_leave_nothing_to_learn() -> None:
    assert [PATTERNS[index] for index in admitted(6)] == list(PATTERNS)
    assert "first_frames" not in {PATTERNS[index] for index in admitted(1)}
    assert "geometry_dense" in {PATTERNS[index] for index in admitted(1)}


def test_the_trivial_row_is_that_of_evaluation(parts: Parts) -> None:
    class Copies:
        def complete(self, scene: u4d.Scene, **_: Any) -> u4d.Scene:
            return next(answers)

    config = parts.recipe.preset.transformer
    truth = fixed_clips(CLIPS, config.num_frames, config.image_size)
    scenes = [u4d.Scene(**{name: part[index] for name, part in vars(truth).items()}) for index in range(CLIPS)]
    answers = iter(scenes)
    report = evaluate(Copies(), scenes, steps=1, guidance=1.0)
    depth, camera = report.row("constant depth"), report.row("static camera")
    trivial = parts.validate().trivial
    assert trivial["abs_rel"] == pytest.approx(depth.summary("abs_rel").mean)
    assert trivial["delta_1_25"] == pytest.approx(depth.summary("delta_1_25").mean)
    rotation = camera.summary("rotation_first_to_last_deg").mean
    assert trivial["rotation_first_to_last_deg"] == pytest.approx(rotation)
    assert trivial["translation_direction_deg"] == camera.summary("translation_direction_deg").median == 90


def same(first: Validation, second: Validation) -> bool:
    numbers = [np.array([*each.losses.values()]) for each in (first, second)]
    return (
        np.array_equal(*numbers, equal_nan=True)
        and first.metrics == second.metrics
        and first.correlations == second.correlations
        and np.array_equal(first.grid, second.grid)
    )


def test_it_is_the_same_every_time_and_leaves_no_trace(parts: Parts) -> None:
    model = parts.model.train()
    next(model.children()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {name: (part.clone(), part.requires_grad) for name, part in model.named_parameters()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = parts.validate()
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes and not all(modes) and any(modes)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is not None and bool((parameter.grad == 1).all())
    torch.manual_seed(2)
    fixed_clips.cache_clear()
    assert same(first, parts.validate())


def test_a_model_that_fails_is_left_in_its_mode(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    model = parts.model.train()
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        parts.validate()
    assert model.training


def test_micro_batches_change_nothing_but_rounding(parts: Parts) -> None:
    whole = parts.validate()
    cut = parts.validate(recipe=replace(parts.recipe, compute=replace(parts.recipe.compute, micro_batch=3)))
    for name, losses in whole.losses.items():
        assert cut.losses[name] == pytest.approx(losses, rel=1e-4, nan_ok=True)
    assert cut.metrics == pytest.approx(whole.metrics, rel=1e-2)


def test_a_clip_is_asked_the_same_beside_others(parts: Parts) -> None:
    """Its task and its noise belong to its number."""
    for index in admitted(6):
        whole = validation.fixed_task(index, torch.arange(4), 6)
        alone = validation.fixed_task(index, torch.tensor([2]), 6)
        assert torch.equal(whole.times[2:3], alone.times) and torch.equal(whole.context[2:3], alone.context)
        assert torch.equal(whole.times[whole.context], torch.zeros(int(whole.context.sum())))
        assert torch.equal(whole.supervised, ~whole.context)
        assert len(whole.times.flatten(1).unique(dim=0)) == 4
    whole, alone = (validation.noise_generators(torch.tensor(clips), 0) for clips in ([0, 1, 2], [2]))
    first, second, third = (torch.rand(3, generator=generator) for generator in whole)
    assert torch.equal(third, torch.rand(3, generator=alone[0])) and not torch.equal(first, second)


def test_dense_completion_does_not_see_the_truth(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other depth and cameras under the same images: the prediction is the same, up to the unit of length."""
    seen: list[Clips] = []

    def keep(step: int, losses: Any, predicted: Clips, truth: Clips) -> None:
        seen.append(predicted)

    monkeypatch.setattr(validation, "summarise", keep)
    config = parts.recipe.preset.transformer
    truth = fixed_clips(CLIPS, config.num_frames, config.image_size)
    parts.validate()
    _, depth, intrinsics, cam_to_world = truth.everything()
    other = replace(truth, depth=depth.flip(-1) * 2, intrinsics=intrinsics.flip(0), cam_to_world=cam_to_world.flip(0))
    monkeypatch.setattr(validation, "fixed_clips", lambda *_: other)
    parts.validate()
    first, second = (clips.everything() for clips in seen)
    torch.testing.assert_close(first[1] * 2, second[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[2], second[2], rtol=1e-4, atol=1e-4)


def test_loss_weights_are_those_of_training(parts: Parts) -> None:
    weights = torch.zeros(4, 16)
    weights[:, 3] = 1
    losses = [
        validate(parts.model, parts.codec, parts.statistics, parts.recipe, 0, "cpu", each).losses["joint"]
        for each in (None, torch.ones(4, 16), weights)
    ]
    assert losses[0] == pytest.approx(losses[1]) and losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_the_picture_shows_input_truth_and_prediction(oracle: Parts) -> None:
    result = oracle.validate()
    height, width = oracle.recipe.preset.transformer.image_size
    assert result.grid.shape == (CLIPS * (height + 4), 3 * (width + 4), 3) and result.grid.dtype == np.uint8
    tiles = result.grid[: height + 4].reshape(height + 4, 3, width + 4, 3).transpose(1, 0, 2, 3)[:, 2:-2, 2:-2]
    truth = fixed_clips(CLIPS, 6, (height, width))
    assert truth.rgb is not None
    assert np.abs(tiles[0] / 255 - truth.rgb[0, 3].permute(1, 2, 0).numpy()).max() < 0.01
    assert np.abs(tiles[1].astype(int) - tiles[2]).mean() < 1  # the oracle's depth is the true one


def test_numbers_that_are_none_are_not_hidden(parts: Parts) -> None:
    class Broken(nn.Module):
        def forward(self, latents: Tensor, times: Tensor) -> Tensor:
            return torch.full_like(latents, math.nan)

    result = parts.validate(model=Broken())
    assert all(math.isnan(loss) for losses in result.losses.values() for loss in losses)
    assert math.isnan(result.metrics["abs_rel"])


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_sharded_again(parts: Parts) -> None:
    """An average that stayed whole would no longer be what the optimiser's step changes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    whole = parts.validate()
    mesh = init_device_mesh("cpu", (1,))
    for block in parts.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(parts.model, mesh=mesh)
    sharded = parts.validate()
    assert all(isinstance(parameter, DTensor) for parameter in parts.model.parameters())
    for name, losses in whole.losses.items():
        assert sharded.losses[name] == pytest.approx(losses, rel=1e-4, nan_ok=True)
