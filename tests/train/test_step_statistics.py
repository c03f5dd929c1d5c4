"""Diffusion forcing as training really does it: what is drawn how often, and what the loss lets through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from u4d.diffusion.flow import channel_mask, shift_time
from u4d.diffusion.losses import FlowLoss
from u4d.diffusion.patterns import PATTERNS
from u4d.model.codec import TinyCodec
from u4d.model.latents import Statistics
from u4d.model.transformer import Transformer
from u4d.train.data.samples import Samples, TrainingClips, draw_samples
from u4d.train.data.sources import open_sources, read_clips
from u4d.train.recipe import Phase, Recipe, debug_run
from u4d.train.step import clean_latents, micro_batch_loss

WEIGHTS = {"joint": 1.0, "first_frames": 1.0, "geometry_dense": 2.0, "camera_control": 3.0, "geometry_sparse": 1.0}
PHASE = Phase(steps=10, patterns=WEIGHTS, frames={6: 1.0}, clean_context_prob=0.25)
BATCH = 2000
Networks = tuple[Transformer, TinyCodec]
STATISTICS = Statistics(torch.zeros(4, 16), torch.ones(4, 16), 1.0)


def recipe_of(phase: Phase) -> Recipe:
    return replace(debug_run(), phases=(phase,))


@pytest.fixture(scope="module")
def clips() -> TrainingClips:
    """Two clips that know everything."""
    read = read_clips(open_sources(recipe_of(PHASE)), range(2)).clips
    assert read is not None
    return read


def small(clips: TrainingClips, available: tuple[bool, ...] = (True,) * 4) -> TrainingClips:
    """Very many very small clips with those streams: for statistics of what is drawn."""
    cut = clips.clips.map(lambda part: part[:1])
    rgb, depth, *_ = cut.everything()
    cut = replace(cut, rgb=rgb[..., :16, :16], depth=depth[..., :16, :16])
    many = cut.map(lambda part: part.expand(BATCH, *part.shape[1:]))
    return TrainingClips(many, torch.tensor([available]).repeat(BATCH, 1), torch.arange(BATCH))


def shares(pattern: Tensor) -> list[float]:
    return (torch.bincount(pattern, minlength=len(PATTERNS)) / len(pattern)).tolist()


def test_patterns_come_as_often_as_their_weights(clips: TrainingClips) -> None:
    samples = draw_samples(recipe_of(PHASE), 0, range(BATCH), small(clips))
    assert shares(samples.task.pattern) == pytest.approx([1 / 8, 1 / 8, 2 / 8, 3 / 8, 1 / 8], abs=0.04)


@pytest.mark.parametrize(
    ("available", "wanted"),
    [
        ((True, False, False, False), [1 / 3, 1 / 3, 0, 0, 1 / 3]),
        ((True, True, False, False), [1 / 5, 1 / 5, 2 / 5, 0, 1 / 5]),
        ((True, False, True, True), [1 / 8, 1 / 8, 2 / 8, 3 / 8, 1 / 8]),
    ],
)
def test_missing_streams_rule_patterns_out(
    available: tuple[bool, ...], wanted: list[float], clips: TrainingClips
) -> None:
    task = draw_samples(recipe_of(PHASE), 0, range(BATCH), small(clips, available)).task
    assert shares(task.pattern) == pytest.approx(wanted, abs=0.04)
    missing = ~torch.tensor(available)
    assert (task.times[:, missing] == 1).all()
    assert not task.context[:, missing].any() and not task.supervised[:, missing].any()


def test_context_is_clean_as_often_as_asked_and_low_otherwise(clips: TrainingClips) -> None:
    task = draw_samples(recipe_of(PHASE), 0, range(BATCH), small(clips)).task
    given = task.context.flatten(1).any(1)
    clean = (torch.where(task.context, task.times, 0.0) == 0).flatten(1).all(1)
    assert float(clean[given].float().mean()) == pytest.approx(0.25, abs=0.04)
    levels = task.times[task.context & ~clean[:, None, None]]
    assert float(levels.min()) >= 0 and float(levels.max()) <= 0.3
    assert float(levels.mean()) == pytest.approx(0.15, abs=0.01)
    assert float(levels.std()) == pytest.approx(0.3 / 12**0.5, abs=0.01)


def test_targets_follow_the_shifted_schedule_above_a_floor_per_sample(clips: TrainingClips) -> None:
    """E[t] = E[lo] + (1 - E[lo]) E[shift(u)]; a fixed floor is never gone below."""
    joint = replace(PHASE, patterns={"joint": 1.0})
    times = draw_samples(recipe_of(joint), 0, range(BATCH), small(clips)).task.times.flatten(1)
    shifted = float(shift_time(torch.linspace(0, 1, 10001)).mean())
    assert float(times.mean()) == pytest.approx(0.5 + 0.5 * shifted, abs=0.01)
    lowest = times.min(1).values  # close above the floor, which is uniform
    assert float((lowest > 0.75).float().mean()) == pytest.approx(0.25 + 0.1, abs=0.1)
    assert float((times.std(1) > 0.02).float().mean()) > 0.9  # levels differ within a sample
    fixed = draw_samples(recipe_of(replace(joint, target_floor=0.9)), 0, range(BATCH), small(clips)).task.times
    assert float(fixed.min()) >= 0.9 and float(fixed.mean()) == pytest.approx(0.9 + 0.1 * shifted, abs=0.005)


def test_a_fixed_floor_leaves_the_loss_to_the_targets(clips: TrainingClips) -> None:
    """Noisy context is supervised with the recipe's uniform floor, and not in the regression-like phase."""
    forcing = draw_samples(recipe_of(PHASE), 0, range(BATCH), small(clips)).task
    assert torch.equal(forcing.supervised, forcing.times > 0)
    early = draw_samples(recipe_of(replace(PHASE, target_floor=0.9)), 0, range(BATCH), small(clips)).task
    assert torch.equal(early.supervised, ~early.context)


# What follows asks the step itself.


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[Transformer, TinyCodec]]:
    """A model and a codec with random weights; its head is not zero, so every output depends on every input."""
    preset = debug_run().preset
    assert preset.codec is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield Transformer(preset.transformer), TinyCodec(16, 8, 16, 1).eval().requires_grad_(False)


def loss_of(parts: Networks, samples: Samples, counts: Tensor | None = None) -> tuple[FlowLoss, Tensor]:
    """The step's loss, and the model's velocities with their gradients."""
    model, codec = parts
    answers = []
    handle = model.register_forward_hook(lambda module, args, output: answers.append(output) or output.retain_grad())
    try:
        counts = samples.group_counts if counts is None else counts
        loss = micro_batch_loss(model, codec, STATISTICS, samples, counts, torch.ones(4, 16), "fp32")
        model.zero_grad()
        loss.total.backward()
    finally:
        handle.remove()
    return loss, answers[0]


def mixed_samples(clips: TrainingClips) -> Samples:
    """An RGB-only clip beside a full one, everything a target."""
    available = torch.tensor([[True, False, False, False], [True] * 4])
    return draw_samples(
        recipe_of(replace(PHASE, patterns={"joint": 1.0})), 0, range(2), replace(clips, available=available)
    )


def test_a_missing_stream_is_pure_noise_for_the_model(parts: Networks, clips: TrainingClips) -> None:
    model, codec = parts
    samples, seen = mixed_samples(clips), []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args))
    loss_of(parts, samples)
    handle.remove()
    noisy, times = seen[0]
    assert torch.equal(noisy[0, 1:], samples.noise[0, 1:]) and bool((times[0, 1:] == 1).all())
    assert not torch.equal(noisy[1, 1:], samples.noise[1, 1:])
    clean = clean_latents(samples, codec, STATISTICS, torch.device("cpu"))
    assert not clean[0, 1:].any() and clean[1].flatten(1).any(1).all()


def test_depth_is_not_encoded_where_no_clip_has_any(parts: Networks, clips: TrainingClips) -> None:
    """Nor does that change the latents of a clip beside one that has it."""
    codec, encoded = parts[1], []

    class Counting:
        def encode(self, clip: Tensor, stream: str) -> Tensor:
            encoded.append(stream)
            return codec.encode(clip, stream)

        def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor:
            raise AssertionError

    samples = mixed_samples(clips)
    latents = [clean_latents(part, Counting(), STATISTICS, torch.device("cpu")) for part in samples.split(1)]
    assert encoded == ["rgb", "rgb", "depth"]
    together = clean_latents(samples, Counting(), STATISTICS, torch.device("cpu"))
    assert encoded[3:] == ["rgb", "depth"] and torch.allclose(torch.cat(latents), together, atol=1e-6)
    assert not latents[0][:, 1:].any()


def test_no_gradient_comes_from_a_missing_stream(parts: Networks, clips: TrainingClips) -> None:
    """Its velocities get none, unlike all others; and nothing of its true values reaches loss or gradients."""
    samples = mixed_samples(clips)
    loss, velocity = loss_of(parts, samples)
    gradient = velocity.grad
    assert gradient is not None and not gradient[0, 1:].any()
    live = channel_mask()[:, :, None, None, None].bool().expand(4, 16, *gradient.shape[3:])
    assert (gradient[1] != 0)[live].all() and (gradient[0, 0] != 0).all()
    weights = {name: p.grad.clone() for name, p in parts[0].named_parameters() if p.grad is not None}
    known = samples.clips.clips
    _, depth, _, cam_to_world = known.everything()
    poisoned = replace(
        known,
        depth=torch.stack((torch.full_like(depth[0], float("nan")), depth[1])),
        cam_to_world=torch.stack((7 * cam_to_world[0], cam_to_world[1])),
    )
    other, _ = loss_of(parts, replace(samples, clips=replace(samples.clips, clips=poisoned)))
    assert torch.equal(loss.total, other.total)
    for name, parameter in parts[0].named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, weights[name]), name


def test_a_mixed_batch_is_the_weighted_sum_of_its_clips(parts: Networks, clips: TrainingClips) -> None:
    """Each alone, divided by its own number of groups, weighted by its share of the groups; gradients alike."""
    samples = mixed_samples(clips)
    whole, _ = loss_of(parts, samples)
    gradient = parts[0].get_parameter("blocks.0.attn1.to_v.weight").grad
    assert gradient is not None
    gradient = gradient.clone()
    alone = [loss_of(parts, part)[0] for part in samples.split(1)]
    counts = torch.stack([part.group_counts for part in alone])
    share = counts / counts.sum(0)
    assert share[:, 0].tolist() == [0.5, 0.5] and share[:, 1].tolist() == [0.0, 1.0]
    weighted = (torch.stack([part.per_stream for part in alone]) * share).sum(0)
    assert torch.allclose(whole.per_stream, weighted, rtol=1e-5)
    summed = torch.zeros_like(gradient)
    total = 0.0
    for part in samples.split(1):
        loss, _ = loss_of(parts, part, samples.group_counts)
        total += float(loss.total.detach())
        summed += parts[0].get_parameter("blocks.0.attn1.to_v.weight").grad
    assert total == pytest.approx(float(whole.total.detach()), rel=1e-5)
    assert torch.allclose(summed, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_a_clip_with_cameras_alone_is_scaled_by_them(clips: TrainingClips, parts: Networks) -> None:
    """The scale never comes from a hidden depth: rays of the largest moment 1 are those of the camera's extent."""
    available = torch.tensor([[True, False, True, True], [True] * 4])
    joint = recipe_of(replace(PHASE, patterns={"joint": 1.0}))
    samples = draw_samples(joint, 0, range(2), replace(clips, available=available))
    moments = clean_latents(samples, parts[1], STATISTICS, torch.device("cpu"))[:, 3, :12]
    doubled = replace(samples.clips.clips, depth=2 * samples.clips.clips.everything()[1])
    again = replace(samples, clips=replace(samples.clips, clips=doubled))
    later = clean_latents(again, parts[1], STATISTICS, torch.device("cpu"))[:, 3, :12]
    assert torch.equal(moments[0], later[0]) and torch.allclose(moments[1], 2 * later[1], atol=1e-5)
